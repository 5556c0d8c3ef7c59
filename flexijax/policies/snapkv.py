"""SnapKV: of the prompt, the tokens that its last queries attend to; all that is generated."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

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
class SnapKV(Policy):
    """Keeps B tokens of the prompt, its last `window` among them, and every generated one.

    With a the attention of the last W prompt queries, softmax over all tokens that each sees:

        rank[t] = mean over the G query heads of avgpool_kernel(mean over W of a)[t],  t < S - W

    where the pool has stride 1 and zeros beyond both ends; the W tokens of the window stay by rule.
    Nothing is evicted while decoding. Device bytes: B + new tokens of every head.
    Source: https://arxiv.org/abs/2404.14469; window 64 and kernel 5 as in kvpress.
    Raises ValueError for a window or an even or non-positive kernel that cannot be.
    """

    window: int = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd and positive")

    @property
    def prompt_window(self) -> int:
        """See `Policy`."""
        return self.window

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group that grows: see `Policy`. Raises ValueError for a budget within the window."""
        budget = run.budget_tokens
        if budget <= self.window:
            raise ValueError(
                f"budget_tokens={budget} must be more than window={self.window} of policy='snapkv'"
            )
        grown = (Tier(budget + run.max_new_tokens),)
        return (HeadGroup(run.all_heads, grown, unit="token", prompt_room=budget),)

    def init_state(self, tokens: int) -> PolicyState:
        """What the window gave each token, float32[T]: see `Policy`."""
        return PolicyState(tokens=jnp.zeros(tokens, jnp.float32))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """The formula above, over a prompt whose tokens are in order: see `Policy`."""
        queries = jnp.maximum((window.position >= 0).sum(), 1).astype(jnp.float32)
        mean = attention(window).sum(axis=(0, 1)) / (queries * window.q.shape[0])
        mean = jnp.where(self._in_window(tokens), 0.0, mean)
        half = self.kernel // 2
        pooled = lax.reduce_window(mean, 0.0, lax.add, (self.kernel,), (1,), ((half, half),))
        return PolicyState(tokens=pooled / self.kernel)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """The window, then by the formula above: see `Policy`."""
        return jnp.where(self._in_window(tokens), jnp.inf, state.tokens)

    def _in_window(self, tokens: Tokens) -> jax.Array:
        return tokens.position >= tokens.length - self.window


def oracle(q: np.ndarray, k: np.ndarray, *, scale: float, window: int, kernel: int) -> np.ndarray:
    """The rank float64[S] of one KV head; +inf in the window.

    q: float[G, S, H], the prompt's queries; k: float[S, H].
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    length = k.shape[0]
    seen = np.arange(length) <= np.arange(length - window, length)[:, None]
    logits = np.where(seen, scale * q[:, -window:] @ k.T, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mean = np.pad(weights.mean(axis=(0, 1))[: length - window], kernel // 2)
    pooled = np.convolve(mean, np.ones(kernel) / kernel, mode="valid")
    return np.concatenate([pooled, np.full(window, np.inf)])
