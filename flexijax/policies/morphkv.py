"""MorphKV: of the older tokens, those that the newest queries attend to; a constant size."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.policies.base import HeadGroup, Policy, PolicyState, RunSpec, Tier, Tokens, Window


@dataclasses.dataclass(frozen=True)
class MorphKV(Policy):
    """Keeps the `window` newest tokens, and of the older ones those that their queries look at.

    With l the logits of the last W queries, each over the older tokens alone, t < S - W:

        rank[t] = fuse over w of softmax over t of (sum over the G query heads of l[g, w, t])

    where `fuse` is "sum" or "max". What was attended before the last W queries plays no part. The
    logits are summed before the softmax, not the weights after it. Ranked every R steps, where up
    to R tokens go; the authors' code does so at each step by default. W logits are remembered of
    each token, as the authors do, so that queries of earlier chunks count: 4 W bytes a token beside
    its keys and values. Device bytes: B + R tokens of every head, however many are generated.
    Source: https://arxiv.org/abs/2503.00979, read with ghadiaravi13/MorphKV, whose LongBench runs
    sum over 32 queries.
    Raises ValueError for a window or a fusion that cannot be.
    """

    window: int = 32
    fuse: Literal["sum", "max"] = "sum"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.fuse not in ("sum", "max"):
            raise ValueError(f"fuse={self.fuse!r} must be 'sum' or 'max'")

    @property
    def prompt_window(self) -> int:
        """See `Policy`."""
        return self.window

    @property
    def observes_decode(self) -> bool:
        """See `Policy`."""
        return True

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`. Raises ValueError for a budget within the window."""
        if run.budget_tokens <= self.window:
            raise ValueError(
                f"budget_tokens={run.budget_tokens} must be more than window={self.window} of "
                "policy='morphkv'"
            )
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def init_state(self, tokens: int) -> PolicyState:
        """Logits of the last W queries float32[T, W], and where the next one's go: see `Policy`."""
        logits = jnp.full((tokens, self.window), -jnp.inf, jnp.float32)
        return PolicyState(tokens=logits, head=jnp.int32(0))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """The queries that come take the places of as many of the oldest: see `Policy`."""
        is_query = window.position >= 0
        place, count = jnp.cumsum(is_query) - 1, is_query.sum()
        stays = is_query & (place >= count - self.window)
        place = jnp.where(stays, (state.head + place) % self.window, self.window)  # others: dropped
        return PolicyState(
            tokens=state.tokens.at[:, place].set(window.logits.sum(0).T, mode="drop"),
            head=(state.head + count) % self.window,
        )

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """The newest, then by the formula above: see `Policy`."""
        newest = tokens.position >= tokens.length - self.window
        older = (tokens.position >= 0) & ~newest
        logits = jnp.where(older[:, None], state.tokens, -jnp.inf)
        total = jax.nn.logsumexp(logits, axis=0)
        # Where there is no older token both are -inf, and their difference is no number.
        weights = jnp.exp(logits - jnp.where(total > -jnp.inf, total, 0.0))
        fused = weights.sum(-1) if self.fuse == "sum" else weights.max(-1)
        return jnp.where(newest, jnp.inf, fused)


def oracle(q: np.ndarray, k: np.ndarray, *, scale: float, window: int, fuse: str) -> np.ndarray:
    """The rank float64[S] of one KV head whose S tokens are all held; +inf in the window.

    q: float[G, S, H], a query for each token; k: float[S, H].
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    older = max(len(k) - window, 0)
    logits = scale * np.einsum("gwh,th->wt", q[:, -window:], k[:older])
    if older:
        logits = np.exp(logits - logits.max(-1, keepdims=True))
        logits /= logits.sum(-1, keepdims=True)
    fused = logits.sum(0) if fuse == "sum" else logits.max(0)
    return np.concatenate([fused, np.full(len(k) - older, np.inf)])
