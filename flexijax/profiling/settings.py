"""How to measure which KV heads are stable, as one validated value."""

from dataclasses import dataclass

from flexijax.policies.page_scores import SCORES

# Ranks pages by the attention that they really get.
MASS = "mass"
RANKINGS = (*SCORES, MASS)
# What heads are called unstable by.
LOST_MASS, RCO = "lost_mass", "rco"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    page_size: tokens in a page. budgets: pages a head chooses, ascending, several at once. window:
    steps over which a head is called stable or not. fraction: share of all heads to call unstable.
    steps: decode steps a document, a multiple of 16 and at least 32. max_tokens: longest prompt.
    score: what ranks the pages, see `record.record`. unstable_by: whether those heads are called
    unstable that lose the most attention by an old choice, "lost_mass", or those that overlap least
    with it, "rco", as FlexiCache has it. Raises ValueError naming the field.
    """

    page_size: int = 16
    budgets: tuple[int, ...] = (64,)
    window: int = 16
    fraction: float = 0.25
    steps: int = 64
    max_tokens: int = 5000
    score: str = "sketch2"
    unstable_by: str = LOST_MASS

    def __post_init__(self) -> None:
        for name in ("page_size", "window", "steps", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets={self.budgets} must be ascending numbers of pages")
        if self.budgets[0] < 2:
            raise ValueError(f"budgets={self.budgets} must each be at least 2 pages")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be between 0 and 1")
        if not 2 <= self.window <= self.steps:
            raise ValueError(f"window={self.window} must be 2 .. steps={self.steps}")
        if self.steps % 16 or self.steps < 32:
            raise ValueError(f"steps={self.steps} must be a multiple of 16, and at least 32")
        if self.score not in RANKINGS:
            raise ValueError(
                f"score={self.score!r} must be one of {', '.join(map(repr, RANKINGS))}"
            )
        if self.unstable_by not in (LOST_MASS, RCO):
            raise ValueError(f"unstable_by={self.unstable_by!r} must be {LOST_MASS!r} or {RCO!r}")
        if self.max_tokens <= self.budgets[0] * self.page_size:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be more than the budget of {self.budgets[0]} "
                f"pages of {self.page_size} tokens, else there is nothing to choose"
            )
