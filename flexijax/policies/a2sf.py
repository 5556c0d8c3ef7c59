"""A2SF: attention gathered so far, of which every later query lets a share be forgotten."""

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
class A2SF(Policy):
    """Keeps the `recent` newest tokens, and of the others those of the greatest weight A.

    At every query, with a its attention summed over the G query heads:

        A[t] <- forgetting A[t] + a[t]

    so that a token that came early does not outweigh others by its age alone. `forgetting=1` is
    `H2O`'s sum. Tokens are evicted up to R at once, every R steps. Every query of a prompt is
    observed, which is a second product of queries and keys. Device bytes: B + R tokens of every
    head. Source: https://arxiv.org/abs/2407.20485, read with Dirac-Notation/A2SF, whose
    `forgetting` of 0.95 and 16 newest tokens are the defaults; that code evicts after the prompt
    only, the paper at every step.
    Raises ValueError for a factor that is not 0 to 1, or a negative number of tokens.
    """

    forgetting: float = 0.95
    recent: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.forgetting <= 1:
            raise ValueError(f"forgetting={self.forgetting} must be 0 to 1")
        if self.recent < 0:
            raise ValueError(f"recent={self.recent} must be at least 0")

    @property
    def prompt_window(self) -> None:
        """Every query: see `Policy`."""
        return None

    @property
    def observes_decode(self) -> bool:
        """See `Policy`."""
        return True

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`. Raises ValueError for a budget of the newest tokens alone."""
        if run.budget_tokens <= self.recent:
            raise ValueError(
                f"budget_tokens={run.budget_tokens} must be more than recent={self.recent} of "
                "policy='a2sf'"
            )
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def init_state(self, tokens: int) -> PolicyState:
        """The weight A, float32[T]: see `Policy`."""
        return PolicyState(tokens=jnp.zeros(tokens, jnp.float32))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """The formula above, of W queries at once: see `Policy`."""
        is_query = window.position >= 0
        age = (window.position.max() - window.position).astype(jnp.float32)
        keeps = jnp.where(is_query, jnp.float32(self.forgetting) ** age, 0.0)
        gathered = jnp.einsum("W,GWT->T", keeps, attention(window))
        left = jnp.float32(self.forgetting) ** is_query.sum().astype(jnp.float32)
        return PolicyState(tokens=left * state.tokens + gathered)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """The newest, then by weight: see `Policy`."""
        newest = tokens.position >= tokens.length - self.recent
        return jnp.where(newest, jnp.inf, state.tokens)


def oracle(q: np.ndarray, k: np.ndarray, *, scale: float, forgetting: float) -> np.ndarray:
    """The weight A float64[T] of one KV head after all T queries of a text, nothing evicted.

    q: float[G, T, H]; k: float[T, H].
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    weight = np.zeros(len(k))
    for at in range(len(k)):
        logits = scale * q[:, at] @ k[: at + 1].T
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        weight *= forgetting
        weight[: at + 1] += (shares / shares.sum(-1, keepdims=True)).sum(0)
    return weight
