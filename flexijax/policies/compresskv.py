"""CompressKV: as SnapKV, but a few query heads choose for all KV heads of their layer."""

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
class CompressKV(Policy):
    """Keeps the prompt's tokens that some query heads attend to, and every generated one.

    With a the attention of the last W prompt queries of the query heads in `heads`, softmax over
    all tokens that each sees:

        rank[t] = mean over those heads of avgpool_kernel(sum over W of a)[t],  t < S - W

    where the pool has stride 1 and zeros beyond both ends; the W tokens of the window stay by rule.
    It is one rank for all KV heads of the layer, so they keep the same tokens.

    heads: per layer, query heads 0 .. N - 1; the paper's are the 4 of a layer that look most at the
    answer's span when a model answers from a long text, found offline. None takes all of them: the
    baseline that the paper compares with, not its method. rooms: per layer, the tokens of a prompt
    that stay; the paper shares out a total by the error that evicting in each layer makes, measured
    offline. None is B in all.
    Nothing is evicted while decoding. Device bytes: the rooms + new tokens of every head.
    Source: https://arxiv.org/abs/2508.02401, read with TUDa-HWAI/CompressKV: window 8, kernel 5.
    Raises ValueError for a window, kernel, heads or rooms that cannot be.
    """

    heads: tuple[tuple[int, ...], ...] | None = None
    rooms: tuple[int, ...] | None = None
    window: int = 8
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} must be odd and positive")
        if self.heads is not None and not all(self.heads):
            raise ValueError(f"heads={self.heads} must name a query head in every layer")
        if self.heads is not None and len({len(of_layer) for of_layer in self.heads}) > 1:
            raise ValueError(f"heads={self.heads} must be as many in every layer")

    @property
    def prompt_window(self) -> int:
        """See `Policy`."""
        return self.window

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group that grows: see `Policy`.

        Raises ValueError for a room within the window, or tables of another model.
        """
        shape = run.shape
        for name, table in (("heads", self.heads), ("rooms", self.rooms)):
            if table is not None and len(table) != shape.num_layers:
                raise ValueError(
                    f"{name} of policy='compresskv' are of {len(table)} layers, the model has "
                    f"{shape.num_layers}"
                )
        if self.heads is not None and not set(self.heads[layer]) <= set(range(shape.num_heads)):
            raise ValueError(
                f"heads={self.heads[layer]} of layer {layer} must be 0 to {shape.num_heads - 1}"
            )
        room = run.budget_tokens if self.rooms is None else self.rooms[layer]
        if room <= self.window:
            raise ValueError(
                f"room={room} of layer {layer} must be more than window={self.window} of "
                "policy='compresskv'"
            )
        grown = (Tier(room + run.max_new_tokens),)
        return (HeadGroup(run.all_heads, grown, unit="token", prompt_room=room),)

    def init_state(self, tokens: int) -> PolicyState:
        """The rank, float32[T]: see `Policy`."""
        return PolicyState(tokens=jnp.zeros(tokens, jnp.float32))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """What each query head gave to tokens before the window, float32[T, G]: see `Policy`."""
        gathered = attention(window).sum(axis=1)  # [G, T]
        gathered = jnp.where(self._in_window(tokens), 0.0, gathered)
        half = self.kernel // 2
        pooled = lax.reduce_window(
            gathered, 0.0, lax.add, (1, self.kernel), (1, 1), ((0, 0), (half, half))
        )
        return PolicyState(tokens=pooled.T / self.kernel)

    def across_heads(self, state: PolicyState, layer: jax.Array) -> PolicyState:
        """The mean over the chosen query heads, for all KV heads: see `Policy`."""
        count, length, group_size = state.tokens.shape
        by_head = state.tokens.swapaxes(1, 2).reshape(count * group_size, length)
        if self.heads is not None:
            by_head = by_head[jnp.asarray(self.heads, jnp.int32)[layer]]
        return PolicyState(tokens=jnp.broadcast_to(by_head.mean(0), (count, length)))

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """The window, then by the formula above: see `Policy`."""
        return jnp.where(self._in_window(tokens), jnp.inf, state.tokens)

    def _in_window(self, tokens: Tokens) -> jax.Array:
        return tokens.position >= tokens.length - self.window


def oracle(
    q: np.ndarray, k: np.ndarray, heads: list[int], *, scale: float, window: int, kernel: int
) -> np.ndarray:
    """The rank float64[S] of a layer; +inf in the window.

    q: float[N, S, H], the prompt's queries; k: float[K, S, H].
    """
    q, k = q.astype(np.float64), k.astype(np.float64)
    length, found = k.shape[1], []
    seen = np.arange(length) <= np.arange(length - window, length)[:, None]
    for head in heads:
        keys = k[head // (len(q) // len(k))]
        logits = np.where(seen, scale * q[head, -window:] @ keys.T, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        total = np.pad(weights.sum(0)[: length - window], kernel // 2)
        found.append(np.convolve(total, np.ones(kernel) / kernel, mode="valid"))
    return np.concatenate([np.mean(found, axis=0), np.full(window, np.inf)])
