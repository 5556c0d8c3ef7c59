"""LazyEviction: tokens that were attended to again and again, and are due to be once more."""

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
class LazyEviction(Policy):
    """Keeps the `recent` newest tokens, and of the others those likely to be attended to again.

    A token is active at a step whose attention to it is at least `threshold`. With TS the last such
    step, its own to begin with, and MRI the longest time from one to the next so far:

        rank = 2 sigma(-1 - (t - TS) / MRI) + 2 sigma(1 - MRI),   sigma(x) = 1 / (1 + e^-x)

    so that what comes back seldom is waited for longer, and what comes back at every step stays.
    Of tokens that have never come back (MRI = 0, to which the formula gives 0) the last active
    stay, which is ours. Tokens are evicted up to R at once, every R steps: the paper's lag, after
    which it keeps as many newest tokens. Every query of a prompt is observed. Device bytes: B + R
    tokens of every head, and 8 bytes a token.
    Source: https://arxiv.org/abs/2506.15969, read with a copy of Halo-949/LazyEviction in
    WeianMao/triattention: threshold 0.0001, and lags of 101 to 363 steps. What differs: there each
    query head has a cache of its own, here the greatest attention of the G of a KV head counts;
    there only what is generated is observed.
    Raises ValueError for a threshold outside of 0 to 1, or a negative number of tokens.
    """

    threshold: float = 0.0001
    recent: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold={self.threshold} must be at least 0 and less than 1")
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
                "policy='lazy_eviction'"
            )
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def init_state(self, tokens: int) -> PolicyState:
        """TS and MRI, int32[T], -1 and 0 of tokens of which nothing is known: see `Policy`."""
        nothing = jnp.zeros(tokens, jnp.int32)
        return PolicyState(tokens={"active": nothing - 1, "longest": nothing})

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """TS and MRI after the window's queries, in their order: see `Policy`."""
        sees = window.logits.max(0) > -jnp.inf
        is_active = sees & (attention(window).max(0) >= self.threshold)
        step = jnp.where(is_active, window.position[:, None], -1)  # int32[W, T]
        active = state.tokens["active"]
        active = jnp.where(active < 0, tokens.position, active)
        # The last active step up to each query; before the first of them, the one known so far.
        so_far = lax.cummax(jnp.concatenate([active[None], step]), axis=0)
        gaps = jnp.where(is_active, step - so_far[:-1], 0)
        longest = jnp.maximum(state.tokens["longest"], gaps.max(0))
        return PolicyState(tokens={"active": so_far[-1], "longest": longest})

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """The newest, then by the formula above: see `Policy`."""
        longest = jnp.maximum(state.tokens["longest"], 1).astype(jnp.float32)
        idle = (tokens.length - 1 - state.tokens["active"]).astype(jnp.float32)
        rank = 2 * jax.nn.sigmoid(-1 - idle / longest) + 2 * jax.nn.sigmoid(1 - longest)
        # Below all that have come back, whose rank is at least 0.
        rank = jnp.where(state.tokens["longest"] > 0, rank, -1 - idle)
        newest = tokens.position >= tokens.length - self.recent
        return jnp.where(newest, jnp.inf, rank)


def oracle(weights: np.ndarray, *, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(TS, MRI, rank float64[T]) after the steps of a text whose tokens are all held.

    weights: float[T, T], of each step the greatest attention of a query head to each token. The
    rank is the formula's, negative where it gives 0: less by the steps since the token was active.
    """
    length = len(weights)
    active, longest, rank = np.arange(length), np.zeros(length, int), np.zeros(length)
    for step, token in np.argwhere(np.tri(length, dtype=bool) & (weights >= threshold)):
        longest[token] = max(longest[token], step - active[token])
        active[token] = step
    for token in range(length):
        idle, gap = length - 1 - active[token], longest[token]
        rank[token] = -1 - idle
        if gap:
            rank[token] = 2 / (1 + np.exp(1 + idle / gap)) + 2 / (1 + np.exp(gap - 1.0))
    return active, longest, rank
