"""How the cache behaves, as one validated value."""

from dataclasses import dataclass

from flexijax.pallas_kernels.dispatch import IMPLEMENTATIONS
from flexijax.policies.intervals import Adaptive

MODES = ("flexi", "quest", "full")
DTYPES = ("float32", "bfloat16", "float16")
SUMMARY_DTYPES = (*DTYPES, "int8")
SCORES = ("minmax", "sketch1", "sketch2", "sketch4")
TRANSFERS = ("zero_copy", "staged")
ADAPTIVE = "adaptive"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How keys and values are kept, chosen and moved.

    mode: "flexi" keeps unstable heads on the device and the others' unchosen pages on the host;
        "quest" keeps every page on the device and chooses at every step; "full" attends to all.
    page_size: tokens in a page, a power of two.
    budget_tokens: tokens a head attends to beside the newest ones; a multiple of `page_size`.
    rerank_interval: decode steps between two rerankings of the stable heads; "adaptive" gives each
        head an interval of its own, longer while it keeps choosing the same pages.
    dtype: of the keys and values; None is the model's own.
    score: how pages are chosen; "minmax" by an upper bound of every product in a page, "sketch1",
        "sketch2", "sketch4" by the attention that its keys would get, rounded to so many bits.
    summary_dtype: of minima and maxima; None is `dtype`, "int8" is 8 bit with a scale.
    implementation: of the kernels; None lets each kernel choose what suits the device.
    transfer: how pages cross between device and host; None lets the device choose.

    Raises ValueError, naming the field and its value, when a value could not work.
    """

    mode: str = "flexi"
    page_size: int = 16
    budget_tokens: int = 1024
    rerank_interval: int | str = 16
    dtype: str | None = None
    score: str = "sketch2"
    summary_dtype: str | None = None
    implementation: str | None = None
    transfer: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} must be one of {_listed(MODES)}")
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} must be one of {_listed(SCORES)}")
        for name in ("page_size", "budget_tokens"):
            _require_positive_int(name, getattr(self, name))
        if self.rerank_interval != ADAPTIVE:
            _require_positive_int("rerank_interval", self.rerank_interval, f" or {ADAPTIVE!r}")
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size={self.page_size} must be a power of two, such as 16")
        if self.budget_tokens % self.page_size:
            below = self.budget_tokens // self.page_size * self.page_size
            raise ValueError(
                f"budget_tokens={self.budget_tokens} must be a multiple of "
                f"page_size={self.page_size}, such as {below or self.page_size} "
                f"or {below + self.page_size}"
            )
        if self.budget_pages < 2:
            raise ValueError(
                f"budget_tokens={self.budget_tokens} must be at least 2 pages, "
                f"{2 * self.page_size} tokens: the first and the newest page are always attended"
            )
        for name, choices in (
            ("dtype", DTYPES),
            ("summary_dtype", SUMMARY_DTYPES),
            ("implementation", IMPLEMENTATIONS),
            ("transfer", TRANSFERS),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name}={value!r} must be None or one of {_listed(choices)}")
        if self.summary_dtype is not None and self.score != "minmax":
            raise ValueError(
                f"summary_dtype={self.summary_dtype!r} goes with score='minmax' only: "
                f"score={self.score!r} says by itself how wide its summaries are"
            )

    @property
    def budget_pages(self) -> int:
        """Pages a head attends to beside the tail."""
        return self.budget_tokens // self.page_size

    @property
    def tail_pages(self) -> int:
        """The most pages that can begin between two reranks.

        The page being filled at a rerank is the newest, always chosen, so it is in the budget.
        """
        longest = self.chunk_steps if self.intervals is None else self.intervals.longest
        return -(-longest // self.page_size)

    @property
    def intervals(self) -> Adaptive | None:
        """How each stable head's interval changes; None when it is the same for all."""
        return Adaptive() if self.rerank_interval == ADAPTIVE else None

    @property
    def chunk_steps(self) -> int:
        """Decode steps of one compiled program, after which stable heads may be reranked."""
        if isinstance(self.rerank_interval, str):
            return Adaptive().shortest
        return self.rerank_interval


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _require_positive_int(name: str, value: object, also: str = "") -> None:
    # bool is an int to Python and never what the caller meant here.
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a positive integer{also}")
