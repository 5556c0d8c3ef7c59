"""StreamingLLM: the first few tokens and the newest ones, nothing observed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.policies.base import HeadGroup, Policy, PolicyState, RunSpec, Tier, Tokens


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps `sinks` first tokens and the newest ones, together the budget B; drops the rest.

    Which tokens stay is decided every R steps, so between two decisions up to R more are attended.
    Keys keep the rotation of their place in the text; the paper rotates them by their place in the
    cache, which matters beyond the context that a model was trained for.
    Device bytes: B + R tokens of every head. Source: https://arxiv.org/abs/2309.17453, 4 sinks.
    Raises ValueError for a negative number of sinks.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must be at least 0")

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`. Raises ValueError for a budget of sinks alone."""
        if run.budget_tokens <= self.sinks:
            raise ValueError(
                f"budget_tokens={run.budget_tokens} must be more than sinks={self.sinks} of "
                "policy='streaming_llm'"
            )
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """Sinks first, then the newer the better: see `Policy`."""
        newest = tokens.position.astype(jnp.float32)
        return jnp.where(tokens.position < self.sinks, jnp.inf, newest)


def oracle(length: int, *, sinks: int, room: int) -> np.ndarray:
    """float64[T]: 1 for the tokens of a text of `length` that stay, 0 for the others."""
    position = np.arange(length)
    recent = room - min(sinks, length)
    return ((position < sinks) | (position >= length - recent)).astype(np.float64)
