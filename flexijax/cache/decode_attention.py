"""The attention function of a decode step: one token a request, over its head groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Step
from flexijax.cache.cache import kind
from flexijax.cache.layout import CacheLayout, GroupProgram, without_heads
from flexijax.cache.prefill_kv import replaced
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.policies.base import Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What goes through the decoder in a decode step."""

    layers: tuple[tuple[Any, ...], ...]  # head groups of each layer
    step: Step
    queries: tuple[jax.Array, ...]  # of each layer done so far, see `DecodeAttention`
    arrivals: jax.Array | None  # int32[B, K] of zeros, see `dispatch.decode_attention`


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """Writes each token's key and value, then attends; an `attention_fn`, hashable.

    The state is a `DecodeState`. Of each layer it collects [B, M, H] in the cache's dtype, of which
    the first N are the rotated queries: where dtypes agree, the array that the kernels read, so
    that keeping it copies nothing.
    """

    layout: CacheLayout
    policy: Policy
    implementation: str | None

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """q [B, 1, N, H], k and v [B, 1, K, H] -> out [B, 1, N, H]."""
        sizes = self.layout.sizes
        shape, dtype = sizes.shape, jnp.dtype(sizes.dtype)
        heads = q.shape[2]
        rows, k, v = q[:, 0], k[:, 0].astype(dtype), v[:, 0].astype(dtype)
        whole, kept = rows, rows.astype(dtype)
        if rows.dtype == dtype:
            # Rotated once, for all that reads any of it; a slice alone would be rotated again.
            whole = kept = lax.optimization_barrier(jnp.concatenate([rows, k, v], axis=1))
            rows, k, v = jnp.split(kept, [heads, heads + shape.num_kv_heads], axis=1)
        grouped = rows.reshape(len(rows), shape.num_kv_heads, shape.group_size, shape.head_dim)
        groups, stores = self.layout.groups[layer], []
        for group, arrays in zip(groups, state.layers[layer], strict=True):
            program = GroupProgram(
                sizes, without_heads(group), self.policy, self.implementation, None
            )
            mine = HeadQueries(whole, group.heads, shape.group_size)
            stores.append(kind(group).store(program, arrays, group.heads, mine, state.step))
        out, stores, arrivals = dispatch.decode_attention(
            grouped,
            k,
            v,
            tuple(stores),
            state.arrivals,
            scale=shape.scale,
            implementation=self.implementation,
        )
        arrays = tuple(
            kind(group).after_step(arrays, store, state.step)
            for group, arrays, store in zip(groups, state.layers[layer], stores, strict=True)
        )
        return out.reshape(q.shape), dataclasses.replace(
            state,
            layers=replaced(state.layers, layer, arrays),
            queries=(*state.queries, kept),
            arrivals=arrivals,
        )
