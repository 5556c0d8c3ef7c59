"""How the cache behaves, as one validated value."""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass

from flexijax import policies
from flexijax.pallas_kernels.implementations import IMPLEMENTATIONS
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.base import Policy
from flexijax.policies.codec import CODECS, Codec
from flexijax.profiles.head_profile import HeadProfile

DTYPES = ("float32", "bfloat16", "float16")
TRANSFERS = ("zero_copy", "staged")
ADAPTIVE = "adaptive"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How keys and values are kept, chosen and moved.

    Raises ValueError, naming the field and its value, when a value could not work.
    """

    policy: str | Policy = "flexi"
    """A method by name, see `flexijax.policies.names()`, or an object: `Flexi(score=MinMax())`."""
    page_size: int = 16
    """Tokens in a page, a power of two."""
    budget_tokens: int = 1024
    """Tokens a head attends to, those since the last rerank not counted; a multiple of
    `page_size`."""
    rerank_interval: int | str | Adaptive = 16
    """Decode steps between two reranks; "adaptive", or an `Adaptive` with thresholds of one's own,
    gives each offloaded head its own interval, longer while it keeps choosing the same pages."""
    profile: HeadProfile | str | None = None
    """For policies that ask which heads are stable: a profile, a shipped one's name or a file; None
    looks the model up; "auto" does so too and, where none is shipped, measures one on the prompts,
    see `flexijax.profiling.choose`."""
    dtype: str | None = None
    """Of keys and values; None is the model's own."""
    device_codec: str | Codec | None = None
    """What full pages of heads that choose at every step are kept in, "int8" or "int4", and the
    slots of others where `host_codec` is the same; None: in the dtype."""
    host_codec: str | Codec | None = None
    """The same of pages on the host, which then move in it; slots that are not coded hold what the
    codes stand for."""
    implementation: str | None = None
    """Of the kernels: "xla", "pallas" or "triton"; None lets each choose what suits the device."""
    transfer: str | None = None
    """How pages cross between device and host, "zero_copy" or "staged"; None lets the device
    choose."""

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str | Policy):
            raise ValueError(f"policy={self.policy!r} must be a name or a Policy object")
        self.find_policy()
        for name in ("page_size", "budget_tokens"):
            object.__setattr__(self, name, _positive_int(name, getattr(self, name)))
        if self.rerank_interval != ADAPTIVE and not isinstance(self.rerank_interval, Adaptive):
            interval = _positive_int("rerank_interval", self.rerank_interval, f" or {ADAPTIVE!r}")
            object.__setattr__(self, "rerank_interval", interval)
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size={self.page_size} must be a power of two, such as 16")
        fewest = 2 * self.page_size
        if self.budget_tokens < fewest:
            raise ValueError(
                f"budget_tokens={self.budget_tokens} must be at least 2 pages, "
                f"{fewest} tokens: the first and the newest page are always attended"
            )
        if self.budget_tokens % self.page_size:
            below = self.budget_tokens // self.page_size * self.page_size
            raise ValueError(
                f"budget_tokens={self.budget_tokens} must be a multiple of "
                f"page_size={self.page_size}, such as {below} or {below + self.page_size}"
            )
        if not isinstance(self.profile, HeadProfile | str | None):
            raise ValueError(f"profile={self.profile!r} must be None, a name or a HeadProfile")
        for name, choices in (
            ("dtype", DTYPES),
            ("implementation", IMPLEMENTATIONS),
            ("transfer", TRANSFERS),
        ):
            value = getattr(self, name)
            if value is not None and value not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"{name}={value!r} must be None or one of {listed}")

        for name in ("device_codec", "host_codec"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Codec) and value not in CODECS:
                listed = ", ".join(map(repr, CODECS))
                raise ValueError(f"{name}={value!r} must be None or one of {listed}")
        if self.codecs and self.implementation not in (None, "xla"):
            name = next(iter(self.codecs))
            raise ValueError(
                f"{name}_codec={getattr(self, f'{name}_codec')!r} has no kernels but XLA's: leave "
                f"implementation={self.implementation!r} at None"
            )

    @property
    def codecs(self) -> dict[str, Codec]:
        """The codecs that are asked for, by memory: "device", "host"."""
        named = {"device": self.device_codec, "host": self.host_codec}
        return {
            memory: value if isinstance(value, Codec) else CODECS[value]
            for memory, value in named.items()
            if value is not None
        }

    def as_full(self) -> CacheConfig:
        """The same with dense attention over everything, which needs no profile and no codec."""
        return dataclasses.replace(
            self, policy="full", profile=None, device_codec=None, host_codec=None
        )

    def find_policy(self) -> Policy:
        """The policy that is meant. Raises ValueError where a name is none."""
        return policies.find(self.policy) if isinstance(self.policy, str) else self.policy

    @property
    def budget_pages(self) -> int:
        """The budget in pages."""
        return self.budget_tokens // self.page_size

    @property
    def adaptive(self) -> Adaptive | None:
        """How each offloaded head's interval changes; None when it is the same for all."""
        if isinstance(self.rerank_interval, Adaptive):
            return self.rerank_interval
        return Adaptive() if self.rerank_interval == ADAPTIVE else None

    @property
    def chunk_steps(self) -> int:
        """Decode steps of one compiled program, after which heads are reranked."""
        if isinstance(self.rerank_interval, int):
            return self.rerank_interval
        assert self.adaptive is not None
        return self.adaptive.shortest


def _positive_int(name: str, value: object, also: str = "") -> int:
    """The value as an int, NumPy's included."""
    # bool is an int to Python and never what the caller meant here.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r} must be a positive integer{also}")
    number = operator.index(value)  # pyright: ignore[reportArgumentType]
    if number < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer{also}")
    return number
