"""The attention function of a decode step: one token a request, over its head groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.cache.arrays import Step
from flexijax.cache.cache import kind
from flexijax.cache.layout import CacheLayout, GroupProgram, without_heads
from flexijax.cache.prefill_kv import replaced
from flexijax.policies.base import Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What goes through the decoder in a decode step."""

    layers: tuple[tuple[Any, ...], ...]  # head groups of each layer
    step: Step
    queries: tuple[tuple[jax.Array | None, ...], ...]  # per layer done so far and group


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """Writes each token's key and value, then attends; an `attention_fn`, hashable.

    The state is a `DecodeState`; of groups that want them it collects queries [B, K, G, H].
    """

    layout: CacheLayout
    policy: Policy
    implementation: str | None

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """q [B, 1, N, H], k and v [B, 1, K, H] -> out [B, 1, N, H]."""
        sizes = self.layout.sizes
        shape = sizes.shape
        grouped = q.reshape(q.shape[0], shape.num_kv_heads, shape.group_size, shape.head_dim)
        k, v = k[:, 0].astype(sizes.dtype), v[:, 0].astype(sizes.dtype)
        outs, heads, groups, queries = [], [], [], []
        for group, arrays in zip(self.layout.groups[layer], state.layers[layer], strict=True):
            program = GroupProgram(
                sizes, without_heads(group), self.policy, self.implementation, None
            )
            mine = [_of_heads(x, group.heads) for x in (grouped, k, v)]
            out, arrays = kind(group).attend(program, arrays, *mine, state.step)
            outs.append(out)
            heads += group.heads
            groups.append(arrays)
            wanted = kind(group).num_queries(program)
            queries.append(mine[0].astype(sizes.dtype) if wanted else None)
        # Back from the groups' order of heads to the model's.
        place = tuple(heads.index(head) for head in range(shape.num_kv_heads))
        out = _of_heads(jnp.concatenate(outs, axis=1), place)
        return out.reshape(q.shape), dataclasses.replace(
            state,
            layers=replaced(state.layers, layer, tuple(groups)),
            queries=(*state.queries, tuple(queries)),
        )


def _of_heads(x: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    """x [B, K, ...] of the wanted heads; in slices, which XLA fuses where it would not a gather."""
    if wanted == tuple(range(x.shape[1])):
        return x
    return jnp.stack([x[:, head] for head in wanted], axis=1)
