"""Keys and values of a prompt while it is read, and the attention function of a prefill chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import zeros
from flexijax.cache.observe import observe_all
from flexijax.models.config import AttentionShape
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.tiling import largest_divisor
from flexijax.policies.base import Policy, PolicyState

# Tokens of a prompt read at once: at most enough for the matrix products to run at full rate, few
# enough for a progress bar that moves; at least enough for few programs to serve short prompts.
_MAX_CHUNK, _MIN_CHUNK = 1024, 64


@dataclasses.dataclass(frozen=True)
class PrefillSpec:
    """What reading a prompt is compiled for; a static argument of jitted functions.

    tokens: room for the longest prompt (S). chunk: tokens read at once, a divisor of S. window: how
    many of its last queries are kept for policies to look at, at least one. observers: the policies
    that are shown every query.
    """

    shape: AttentionShape
    tokens: int
    chunk: int
    dtype: str
    window: int
    observers: tuple[Policy, ...]
    implementation: str | None


def chunk_size(room: int, prompt_tokens: int) -> int:
    """Tokens to read at once of prompts of up to so many tokens, where there is room for `room`.

    One of two sizes, so that few programs serve all lengths: the greatest divisor of the room that
    is at most 1024, or that halved as often as it stays at 64 or more, where the prompts fit.

        room 8192: 1024, or 64 for prompts of up to 64 tokens; room 1280: 640 or 80
    """
    short = chunk = largest_divisor(room, _MAX_CHUNK)
    while short % 2 == 0 and short // 2 >= _MIN_CHUNK:
        short //= 2
    return short if prompt_tokens <= short else chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillKV:
    """What is kept of one prompt while it is read, per layer.

    Keys and values are flat over tokens: seen as pages (a mere reshape), XLA's CPU compiler copies
    an array that is written and read in one program, which took twice the memory and a tenth of the
    time.
    """

    k: tuple[jax.Array, ...]  # [K, H, S], channels before tokens as in dense groups
    v: tuple[jax.Array, ...]  # [K, S, H]
    queries: tuple[jax.Array, ...]  # [W, K, G, H], of the last W tokens so far
    observed: tuple[tuple[PolicyState, ...], ...]  # per observer, leaves [K, ...]


def empty_prefill_kv(spec: PrefillSpec) -> PrefillKV:
    """Room for one prompt of up to `spec.tokens` tokens."""
    shape = spec.shape
    heads, width = shape.num_kv_heads, shape.head_dim
    layers = range(shape.num_layers)

    def state(policy: Policy) -> PolicyState:
        return jax.tree.map(
            lambda leaf: zeros((heads, *leaf.shape), leaf.dtype) + leaf,
            policy.init_state(spec.tokens),
        )

    return PrefillKV(
        tuple(zeros((heads, width, spec.tokens), spec.dtype) for _ in layers),
        tuple(zeros((heads, spec.tokens, width), spec.dtype) for _ in layers),
        tuple(zeros((spec.window, heads, shape.group_size, width), spec.dtype) for _ in layers),
        tuple(tuple(state(policy) for policy in spec.observers) for _ in layers),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
    """What goes through the decoder in a prefill chunk."""

    kv: PrefillKV
    start: jax.Array  # int32[], tokens before this chunk
    last: jax.Array  # int32[], index in the chunk of its last token


@dataclasses.dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of a chunk over the prompt so far; an `attention_fn`, hashable.

    The state is a `PrefillState`; a chunk's keys are written before they are attended. In the last
    layer only the chunk's last token attends.
    """

    spec: PrefillSpec

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: PrefillState
    ) -> tuple[jax.Array, PrefillState]:
        """q [1, T, N, H], k and v [1, T, K, H] -> out [1, T, N, H]."""
        spec, shape, tokens = self.spec, self.spec.shape, q.shape[1]
        grouped = q.reshape(tokens, shape.num_kv_heads, shape.group_size, shape.head_dim)
        kv = state.kv
        keys, values = kv.k[layer], kv.v[layer]
        new_k = k[0].astype(keys.dtype).transpose(1, 2, 0)
        new_v = v[0].astype(values.dtype).transpose(1, 0, 2)
        keys = lax.dynamic_update_slice_in_dim(keys, new_k, state.start, axis=2)
        values = lax.dynamic_update_slice_in_dim(values, new_v, state.start, axis=1)
        asked, start = grouped, state.start
        if is_last := layer == shape.num_layers - 1:
            # All that a prompt leaves of this layer is the hidden state of its last token.
            asked = lax.dynamic_slice_in_dim(grouped, state.last, 1)
            start = state.start + state.last
        out = dispatch.prefill_attention(
            asked, keys, values, start, scale=shape.scale, implementation=spec.implementation
        )
        if is_last:
            out = lax.dynamic_update_slice_in_dim(jnp.zeros_like(grouped), out, state.last, axis=0)
        # The window that ends at `last`, which the tokens before this chunk may have begun.
        known = jnp.concatenate([kv.queries[layer][1:], grouped.astype(spec.dtype)])
        window = lax.dynamic_slice_in_dim(known, state.last, spec.window)
        at = jnp.arange(tokens, dtype=jnp.int32)
        positions = jnp.where(at <= state.last, state.start + at, -1)
        observed = tuple(
            observe_all(
                policy,
                seen,
                grouped,
                keys,
                values,
                positions,
                jnp.int32(layer),
                scale=shape.scale,
            )
            for policy, seen in zip(spec.observers, kv.observed[layer], strict=True)
        )
        kv = PrefillKV(
            replaced(kv.k, layer, keys),
            replaced(kv.v, layer, values),
            replaced(kv.queries, layer, window),
            replaced(kv.observed, layer, observed),
        )
        return out.reshape(q.shape), dataclasses.replace(state, kv=kv)


def replaced(items: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    """The items with another value at `index`."""
    return (*items[:index], value, *items[index + 1 :])
