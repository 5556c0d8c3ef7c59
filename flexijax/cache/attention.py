"""The two `attend` plugs that join a decoder to the cache: one for prefill, one for decode."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.cache import CacheLayout, LayerCache
from flexijax.cache.rerank import find_slots
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.dispatch import prefill_attention
from flexijax.policies.base import Policy, forced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Workspace:
    """Dense keys and values of one request while its prompt is read, per layer.

    Flat over tokens: seen as pages (a mere reshape), XLA's CPU compiler copies an array that is
    written and read in one program, which took twice the workspace and a tenth of the time.
    """

    k: tuple[jax.Array, ...]  # [K, H, S], channels before tokens as in slots
    v: tuple[jax.Array, ...]  # [K, S, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
    """What goes through the decoder in a prefill chunk."""

    workspace: Workspace
    start: jax.Array  # int32[], tokens before this chunk
    last: jax.Array  # int32[], index in the chunk of its last token
    queries: tuple[jax.Array, ...]  # per layer done so far [1, K, G, H], of the last token


@dataclasses.dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of a chunk over the workspace; an `attend` plug, hashable.

    The state is a `PrefillState`; a chunk's keys are written before they are attended.
    """

    layout: CacheLayout
    implementation: str | None

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: PrefillState
    ) -> tuple[jax.Array, PrefillState]:
        """q [1, T, N, H], k and v [1, T, K, H] -> out [1, T, N, H]."""
        shape, tokens = self.layout.shape, q.shape[1]
        grouped = q.reshape(tokens, shape.num_kv_heads, shape.group_size, shape.head_dim)
        keys, values = state.workspace.k[layer], state.workspace.v[layer]
        new_k = k[0].astype(keys.dtype).transpose(1, 2, 0)
        new_v = v[0].astype(values.dtype).transpose(1, 0, 2)
        keys = lax.dynamic_update_slice_in_dim(keys, new_k, state.start, axis=2)
        values = lax.dynamic_update_slice_in_dim(values, new_v, state.start, axis=1)
        out = prefill_attention(
            grouped,
            keys,
            values,
            state.start,
            scale=shape.scale,
            implementation=self.implementation,
        )
        workspace = Workspace(
            _replaced(state.workspace.k, layer, keys), _replaced(state.workspace.v, layer, values)
        )
        last = lax.dynamic_index_in_dim(grouped, state.last, keepdims=False)[None]
        queries = (*state.queries, last)
        return out.reshape(q.shape), dataclasses.replace(
            state, workspace=workspace, queries=queries
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What goes through the decoder in a decode step."""

    layers: tuple[LayerCache, ...]
    block_table: jax.Array  # int32[B, P]
    lengths: jax.Array  # int32[B], tokens held before this step
    active: jax.Array  # bool[B], rows that take part
    queries: tuple[jax.Array, ...]  # per layer done so far [B, K_s, G, H], of slotted heads


@dataclasses.dataclass(frozen=True)
class DecodeAttention:
    """One token per row: writes its key and value, chooses pages, attends; an `attend` plug."""

    layout: CacheLayout
    policy: Policy
    implementation: str | None

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """q [B, 1, N, H], k and v [B, 1, K, H] -> out [B, 1, N, H]."""
        shape = self.layout.shape
        grouped = q.reshape(q.shape[0], shape.num_kv_heads, shape.group_size, shape.head_dim)
        k, v = k[:, 0].astype(self.layout.dtype), v[:, 0].astype(self.layout.dtype)
        cache = state.layers[layer]
        outs, heads = [], []
        queries = grouped[:, :0]
        if paged := self.layout.paged[layer]:
            mine_q, mine_k, mine_v = (_of_heads(x, paged) for x in (grouped, k, v))
            out, cache = self._paged(cache, mine_q, mine_k, mine_v, state)
            outs.append(out)
            heads += paged
        if slotted := self.layout.slotted(layer):
            queries, mine_k, mine_v = (_of_heads(x, slotted) for x in (grouped, k, v))
            out, cache = self._slotted(cache, queries, mine_k, mine_v, state)
            outs.append(out)
            heads += slotted
        # Back from paged-then-slotted to the model's order of heads.
        place = tuple(heads.index(head) for head in range(shape.num_kv_heads))
        out = _of_heads(jnp.concatenate(outs, axis=1), place)
        return out.reshape(q.shape), dataclasses.replace(
            state,
            layers=_replaced(state.layers, layer, cache),
            queries=(*state.queries, queries),
        )

    def _paged(
        self, cache: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, LayerCache]:
        """Heads that keep all pages on the device: score, choose, gather through the table."""
        score = self.policy.score
        assert score is not None and cache.pages_k is not None and cache.pages_v is not None
        page_size, blocks = self.layout.page_size, self.layout.blocks
        # Of whole numbers that are never negative; // and % would be 18 instructions in each layer.
        page, offset = lax.div(state.lengths, page_size), lax.rem(state.lengths, page_size)
        block = jnp.take_along_axis(state.block_table, page[:, None], axis=1, mode="clip")[:, 0]
        written = jnp.where(state.active, block, blocks)  # out of bounds: dropped
        pages_k = cache.pages_k.at[written, :, offset].set(k, mode="drop")
        pages_v = cache.pages_v.at[written, :, offset].set(v, mode="drop")
        # A page is summarised once, when it is full; until then it is the newest, chosen by rule.
        full = jnp.where(offset == page_size - 1, written, blocks)
        filled = score.summarize(jnp.take(pages_k, block, axis=0, mode="clip"), cache.paged_state)
        summaries = jax.tree.map(
            lambda pool, rows: pool.at[full].set(rows, mode="drop"), cache.paged_summaries, filled
        )
        lengths = jnp.where(state.active, state.lengths + 1, 0)
        scores = score.scores(
            q,
            summaries,
            cache.paged_state,
            state.block_table,
            lengths,
            page_size=page_size,
            scale=self.layout.shape.scale,
            implementation=self.implementation,
        )
        pages = self.policy.select(forced(scores, lengths, page_size=page_size))
        ids = jnp.take_along_axis(state.block_table[:, None], jnp.maximum(pages, 0), axis=2)
        counts = jnp.clip(lengths[:, None, None] - pages * page_size, 0, page_size)
        out, _ = dispatch.paged_decode(
            q,
            pages_k,
            pages_v,
            jnp.where(pages < 0, -1, ids),
            jnp.where(pages < 0, 0, counts),
            scale=self.layout.shape.scale,
            implementation=self.implementation,
        )
        return out, dataclasses.replace(
            cache, pages_k=pages_k, pages_v=pages_v, paged_summaries=summaries
        )

    def _slotted(
        self, cache: LayerCache, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, LayerCache]:
        """Heads with slots: dense attention over whatever the slots hold."""
        assert cache.slot_page is not None
        assert cache.slots_k is not None and cache.slots_v is not None
        page_size = self.layout.page_size
        page, offset = lax.div(state.lengths, page_size), lax.rem(state.lengths, page_size)
        slot = find_slots(cache.slot_page, page)  # [B, K_s]
        slot = jnp.where(state.active[:, None] & (slot >= 0), slot, self.layout.slots)
        row = jnp.arange(slot.shape[0])[:, None]
        head = jnp.arange(slot.shape[1])[None, :]
        slots_k = cache.slots_k.at[row, head, :, slot, offset[:, None]].set(k, mode="drop")
        slots_v = cache.slots_v.at[row, head, slot, offset[:, None]].set(v, mode="drop")
        lengths = jnp.where(state.active, state.lengths + 1, 0)
        counts = slot_counts(cache.slot_page, lengths, page_size=page_size)
        out, _ = dispatch.slot_decode(
            q,
            slots_k,
            slots_v,
            counts,
            scale=self.layout.shape.scale,
            implementation=self.implementation,
        )
        return out, dataclasses.replace(cache, slots_k=slots_k, slots_v=slots_v)


def slot_counts(slot_page: jax.Array, lengths: jax.Array, *, page_size: int) -> jax.Array:
    """int32[B, K, S]: how many tokens of the page in each slot exist; 0 for an empty slot."""
    counts = jnp.clip(lengths[:, None, None] - slot_page * page_size, 0, page_size)
    return jnp.where(slot_page < 0, 0, counts)


def _of_heads(x: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    """x [B, K, ...] of the wanted heads; in slices, which XLA fuses where it would not a gather."""
    if wanted == tuple(range(x.shape[1])):
        return x
    return jnp.stack([x[:, head] for head in wanted], axis=1)


def _replaced(items: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*items[:index], value, *items[index + 1 :])
