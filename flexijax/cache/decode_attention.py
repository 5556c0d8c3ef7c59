"""The attention function of a decode step: one token a request, over its head groups."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Step, replaced
from flexijax.cache.banks import apart, by_block, by_row, side_by_side, together
from flexijax.cache.cache import kind
from flexijax.cache.coded import coded_heads, rotated
from flexijax.cache.layout import CacheLayout, GroupProgram, without_heads
from flexijax.cache.spread import row_program, step_of
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.stores import (
    AnyStore,
    BankedStore,
    CodedSlotStore,
    CodedStore,
    SlotStore,
    of_heads,
)
from flexijax.policies.base import HeadGroup, Policy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What goes through the decoder in a decode step."""

    # Of each layer its head groups, of each of them the banks that take part.
    layers: tuple[tuple[tuple[Any, ...], ...], ...]
    step: Step
    queries: tuple[jax.Array, ...]  # of each layer done so far, see `DecodeAttention`
    arrivals: jax.Array | None  # int32[B, K] of zeros, see `dispatch.decode_attention`
    # Of each layer done so far, of each group: the pages int32[B, K, n] that it attends to, or None
    # where it attends to all that it has.
    pages: tuple[tuple[jax.Array | None, ...], ...] = ()
    shared: tuple[Any, ...] = ()  # head groups: what lies by block of layers that have places


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
        read, kept = rows, rows.astype(dtype)
        if rows.dtype == dtype:
            # Rotated once, for all that reads any of it; a slice alone would be rotated again.
            read = kept = lax.optimization_barrier(jnp.concatenate([rows, k, v], axis=1))
            rows, k, v = jnp.split(kept, [heads, heads + shape.num_kv_heads], axis=1)
        mine = coded_heads(self.layout.groups[layer])
        v = rotated(v, mine)
        grouped = rows.reshape(len(rows), shape.num_kv_heads, shape.group_size, shape.head_dim)
        groups, stores = self.layout.groups[layer], []
        if groups[0].places:
            made, state = self._over_places(layer, grouped, k, v, state)
            pages = (*state.pages, (None,) * len(groups))
            queries = (*state.queries, kept)
            return made.reshape(q.shape), dataclasses.replace(state, queries=queries, pages=pages)
        for group, arrays in zip(groups, state.layers[layer], strict=True):
            program = GroupProgram(
                sizes, without_heads(group), self.policy, self.implementation, None
            )
            pages = None if group.source is None else self._pages_of(group.source, state)
            stores.append(_store(program, arrays, group.heads, read, state.step, pages))
        out, stores, arrivals = dispatch.decode_attention(
            grouped,
            k,
            v,
            tuple(stores),
            state.arrivals,
            scale=shape.scale,
            implementation=self.implementation,
        )
        out = rotated(out, mine)
        arrays = tuple(
            _after_step(group, arrays, store, state.step)
            for group, arrays, store in zip(groups, state.layers[layer], stores, strict=True)
        )
        return out.reshape(q.shape), dataclasses.replace(
            state,
            layers=replaced(state.layers, layer, arrays),
            queries=(*state.queries, kept),
            arrivals=arrivals,
            pages=(*state.pages, tuple(getattr(store, "pages", None) for store in stores)),
        )

    def _pages_of(self, source: tuple[int, tuple[int, ...]], state: DecodeState) -> jax.Array:
        """What heads of an earlier layer attend to in this step: int32[B, K, n]."""
        layer, heads = source
        by_head = {
            head: chosen[:, at]
            for group, chosen in zip(self.layout.groups[layer], state.pages[layer], strict=True)
            for at, head in enumerate(group.heads)
            if chosen is not None
        }
        return jnp.stack([by_head[head] for head in heads], axis=1)

    def _over_places(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: DecodeState
    ) -> tuple[jax.Array, DecodeState]:
        """As `__call__` of a layer whose groups have places: q [B, K, G, H] -> out alike.

        Of the places that stand for one head all but one are empty, and what they give is 0.
        """
        out, layers, shared = jnp.zeros_like(q), [], []
        parts = zip(self.layout.groups[layer], state.layers[layer], state.shared, strict=True)
        for group, banks, pool in parts:
            first, places = banks[0].first, len(group.heads)
            assert first is not None
            program = GroupProgram(
                self.layout.sizes, without_heads(group), self.policy, self.implementation, None
            )
            program, step = row_program(program, places), step_of(first, state.step)

            def rows(x: jax.Array, heads: tuple[int, ...] = group.heads) -> jax.Array:
                return of_heads(x, heads).reshape(-1, 1, *x.shape[2:])

            banks = tuple(together(bank, pool) for bank in banks)
            store = _store(program, banks, (0,), rows(q)[:, 0], step, None)
            of_group, [store], _ = dispatch.decode_attention(
                rows(q),
                rows(k),
                rows(v),
                (store,),
                scale=program.sizes.shape.scale,
                implementation=self.implementation,
            )
            made = _after_step(program.group, banks, store, step)
            shared.append(dataclasses.replace(by_block(made[0]), first=None))
            layers.append(tuple(map(by_row, made)))
            before = group.heads[0]
            around = (0, 0), (before, q.shape[1] - before - places), (0, 0), (0, 0)
            out = out + jnp.pad(of_group.reshape(len(q), places, *q.shape[2:]), around)
        return out, dataclasses.replace(
            state, layers=replaced(state.layers, layer, tuple(layers)), shared=tuple(shared)
        )


def _store(
    program: GroupProgram,
    banks: tuple[Any, ...],
    heads: tuple[int, ...],
    q: jax.Array,
    step: Step,
    pages: jax.Array | None,
) -> AnyStore:
    """Where a group's heads lie in its banks. q: [B, M, H] of the rows of all banks.

    pages: see `selected.store`.
    """
    of_kind, group_size = kind(program.group), program.sizes.shape.group_size
    if len(banks) == 1 or {"k", "codes"} & set(banks[0].BY_BLOCK):
        rows = side_by_side([by_row(bank) for bank in banks])
        mine = HeadQueries(q, heads, group_size)
        chosen = () if pages is None else (pages,)
        group = together(by_block(banks[0]), rows)
        return of_kind.store(program, group, heads, mine, step, *chosen)
    parts = zip(banks, apart((q, step), len(banks)), strict=True)
    stores = [
        of_kind.store(program, bank, heads, HeadQueries(rows, heads, group_size), at)
        for bank, (rows, at) in parts
    ]
    if isinstance(stores[0], CodedSlotStore):
        return _coded_side_by_side(stores)
    slot_page, held = side_by_side([(store.slot_page, store.held) for store in stores])
    k, v = tuple(store.k for store in stores), tuple(store.v for store in stores)
    return BankedStore(k, v, slot_page, held, heads)


def _coded_side_by_side(stores: list[Any]) -> CodedSlotStore:
    """The stores of some banks as one: coded slots stay apart, tails of a few pages do not."""
    first = stores[0]
    rows = [(of.slot_page, of.coded, of.tail.k, of.tail.v, of.tail.held) for of in stores]
    slot_page, coded, k, v, held = side_by_side(rows)
    of_tail = side_by_side([store.tail.slot_page for store in stores])
    tail = SlotStore(k, v, of_tail, held, first.heads)
    slots = tuple(slot for store in stores for slot in store.slots)
    return CodedSlotStore(slots, slot_page, tail, coded, first.heads, first.bits)


def _after_step(
    group: HeadGroup, banks: tuple[Any, ...], store: AnyStore, step: Step
) -> tuple[Any, ...]:
    """The banks of a group with the token in them."""
    of_kind = kind(group)
    if isinstance(store, CodedStore | CodedSlotStore):  # whose tails lie by row
        tails = [
            dataclasses.replace(store.tail, k=k, v=v)
            for k, v in apart((store.tail.k, store.tail.v), len(banks))
        ]
        return tuple(
            of_kind.after_step(bank, dataclasses.replace(store, tail=tail), step)
            for bank, tail in zip(banks, tails, strict=True)
        )
    if not isinstance(store, BankedStore):
        return tuple(of_kind.after_step(bank, store, step) for bank in banks)
    where = apart((store.slot_page, store.held, step), len(banks))
    return tuple(
        of_kind.after_step(bank, SlotStore(k, v, slot_page, held, store.heads), at)
        for bank, k, v, (slot_page, held, at) in zip(banks, store.k, store.v, where, strict=True)
    )
