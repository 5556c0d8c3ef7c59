"""H2O: the tokens that gathered the most attention so far, and the newest ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.policies.base import (
    HeadGroup,
    Policy,
    PolicyState,
    RunSpec,
    Tier,
    Tokens,
    Window,
    attention,
)


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Keeps the `recent` share of the budget B for the newest tokens, the rest for heavy hitters.

    A token's weight is the attention that it got from every query since it came, summed over the
    queries and over the G query heads:

        S[t] <- S[t] + sum over g, w of softmax(scale q[g, w] . k)[t]

    The paper evicts one token at every step; here it is up to R of them every R steps, the same
    for R = 1, and between two evictions up to R more are attended. Observing every query of a
    prompt is a second product of queries and keys. Device bytes: B + R tokens of every head.
    Source: https://arxiv.org/abs/2306.14048, half of the budget recent; read with
    FMInference/H2O, which has one query head a KV head, so that summing over G is ours.
    Raises ValueError for a share that is none.
    """

    recent: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent} must be 0 to 1")

    @property
    def prompt_window(self) -> None:
        """Every query: see `Policy`."""
        return None

    @property
    def observes_decode(self) -> bool:
        """See `Policy`."""
        return True

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`."""
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def init_state(self, tokens: int) -> PolicyState:
        """The sum of attention so far, float32[T]: see `Policy`."""
        return PolicyState(tokens=jnp.zeros(tokens, jnp.float32))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """The formula above: see `Policy`."""
        return PolicyState(tokens=state.tokens + attention(window).sum(axis=(0, 1)))

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """The newest, then the heaviest: see `Policy`."""
        assert group.room is not None
        newest = tokens.position >= tokens.length - int(self.recent * group.room)
        return jnp.where(newest, jnp.inf, state.tokens)


def oracle(q: np.ndarray, k: np.ndarray, *, scale: float) -> np.ndarray:
    """The weight S float64[T] of one KV head after all T queries of a text, nothing evicted.

    q: float[G, T, H]; k: float[T, H].
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    length = k.shape[0]
    logits = np.where(np.tri(length, dtype=bool), scale * q @ k.T, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True)).sum(axis=(0, 1))
