"""Decode attention, which writes the new token too, and prefill attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.cases import (
    ROWS,
    Case,
    chosen_pages,
    exact,
    keys,
    on_device,
    queries,
    reads,
    scale,
    some_rows,
    updates,
    values,
)
from bench.gpu.data import block_table, changed_tokens, row_error, same_bits, sources, spread
from bench.gpu.sizes import Sizes
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.sparse_decode import reference
from flexijax.pallas_kernels.stores import PageStore, SlotStore, Store


@dataclasses.dataclass(frozen=True)
class _Held:
    """A store on the device, NaN in all that no head holds or none may read, and what is in it.

    Each page of each head stands at a place, an index into `source` when that is flat.
    """

    store: Store
    bases: tuple[np.ndarray, np.ndarray]  # random pages of keys and of values [n, page, H]
    source: np.ndarray  # int32[blocks, K] or [B, K, S], which of them is at each place
    counts: np.ndarray  # int32, like it: tokens that are there before the new one
    places: np.ndarray  # int[B, K, n], of the pages that a head attends, -1 for none
    tokens: np.ndarray  # int[B, K, n], of each of them that count, the new one included

    @classmethod
    def pages(
        cls,
        sizes: Sizes,
        lengths: np.ndarray,
        rng: np.random.Generator,
        heads: tuple[int, ...],
        *,
        blocks: int,
    ) -> _Held:
        """Pages of a pool."""
        table = block_table(rng, lengths, blocks=blocks, pages=sizes.pages, page=sizes.page)
        named = chosen_pages(rng, sizes, lengths, heads=len(heads), room=sizes.budget_pages)
        block = np.take_along_axis(table[:, None], np.maximum(named, 0), axis=2).astype(np.int64)
        places = block * len(heads) + np.arange(len(heads))[:, None]
        found = cls._found(sizes, lengths, rng, (blocks, len(heads)), named, places)
        k, v = (spread(base, found["source"], found["counts"]) for base in found["bases"])
        store = PageStore(k, v, *on_device((named, table, lengths - 1)), heads=heads)
        return cls(store, **found)

    @classmethod
    def slots(
        cls,
        sizes: Sizes,
        lengths: np.ndarray,
        rng: np.random.Generator,
        heads: tuple[int, ...],
    ) -> _Held:
        """Slots of each head's own."""
        named = chosen_pages(rng, sizes, lengths, heads=len(heads), room=sizes.slots)
        places = np.arange(named.size).reshape(named.shape)
        found = cls._found(sizes, lengths, rng, named.shape, named, places)
        k, v = (spread(base, found["source"], found["counts"]) for base in found["bases"])
        k = _channels_first(k)
        store = SlotStore(k, v, *on_device((named, lengths - 1)), heads=heads)
        return cls(store, **found)

    @staticmethod
    def _found(
        sizes: Sizes,
        lengths: np.ndarray,
        rng: np.random.Generator,
        shape: tuple[int, ...],
        named: np.ndarray,
        places: np.ndarray,
    ) -> dict[str, Any]:
        used = named >= 0
        tokens = np.clip(lengths[:, None, None] - named * sizes.page, 0, sizes.page) * used
        newest = used & (named == (lengths[:, None, None] - 1) // sizes.page)
        counts = np.zeros(shape, np.int32)
        counts.flat[places[used]] = (tokens - newest)[used]
        return {
            "bases": (keys(sizes, rng), values(sizes, rng)),
            "source": sources(rng, *shape),
            "counts": counts,
            "places": np.where(used, places, -1),
            "tokens": tokens,
        }

    def error(self, made: Store, new: tuple[np.ndarray, np.ndarray], lengths: np.ndarray) -> float:
        """0 where the new tokens [B, K, H] are in their places and all else is as it was."""
        rows, page = np.flatnonzero(lengths), self.store.page_size
        offset = (lengths[rows] - 1) % page
        b, h, n = np.nonzero(self.newest(lengths))
        place = np.unravel_index(self.places[b, h, n], self.source.shape)
        at = *place, offset[rows.searchsorted(b)]
        wanted = np.zeros((*self.source.shape, page), bool)
        wanted[at] = True
        right = [len(b) == len(rows) * len(self.store.heads)]
        slots = isinstance(self.store, SlotStore)
        for pool, base, token in zip((made.k, made.v), self.bases, new, strict=True):
            changed, there = changed_tokens(
                pool, base, self.source, self.counts, at, channels_first=slots and pool is made.k
            )
            right.append(np.array_equal(changed, wanted))
            right.append(same_bits(there, token[b, np.array(self.store.heads)[h]]))
        return exact(*right)

    def newest(self, lengths: np.ndarray) -> np.ndarray:
        """bool[B, K, n]: which of the attended pages the new token goes to."""
        held = self.counts.reshape(-1)[np.maximum(self.places, 0)]
        return (self.places >= 0) & (held < self.tokens) & (lengths > 0)[:, None, None]

    def attended(self, row: int, local: int, lengths: np.ndarray, *new: np.ndarray) -> Any:
        """Keys and values [tokens, H] that a head attends, the new ones [H] included."""
        used = np.flatnonzero(self.places[row, local] >= 0)
        source = self.source.reshape(-1)[self.places[row, local, used]]
        counts, newest = self.tokens[row, local, used], self.newest(lengths)[row, local, used]
        found = []
        for base, token in zip(self.bases, new, strict=True):
            pages = base[source]
            pages[newest, (lengths[row] - 1) % self.store.page_size] = token
            inside = np.arange(pages.shape[1]) < counts[:, None]
            found.append(pages[inside].astype(np.float64))
        return found


def decode_attention(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """A layer of which every fourth head attends pages of a pool, the others their slots.

    lengths: with the new token; a request without any takes no part.
    """
    paged = tuple(range(0, sizes.heads, 4))
    others = tuple(head for head in range(sizes.heads) if head not in paged)
    stores = (
        _Held.pages(sizes, lengths, rng, paged, blocks=blocks),
        _Held.slots(sizes, lengths, rng, others),
    )
    return _decode(sizes, lengths, rng, stores)


def decode_slots(sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator) -> Case:
    """A layer in which all heads attend their slots."""
    heads = tuple(range(sizes.heads))
    return _decode(sizes, lengths, rng, (_Held.slots(sizes, lengths, rng, heads),))


def _decode(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, stores: tuple[_Held, ...]
) -> Case:
    q = queries(sizes, rng, len(lengths))
    k, v = (x[:, :, 0] for x in (queries(sizes, rng, len(lengths)) for _ in "kv"))

    def error(out: jax.Array, made: tuple[Store, ...]) -> float:
        found = np.asarray(out, np.float32)
        worst = [exact(bool(np.isfinite(found).all()), not found[lengths == 0].any())]
        for held, store in zip(stores, made, strict=True):
            worst.append(held.error(store, (k, v), lengths))
            for b in some_rows(len(lengths)):
                local = b % len(store.heads)
                head = store.heads[local]
                there = held.attended(b, local, lengths, k[b, head], v[b, head])
                q64 = np.asarray(q[b, head], np.float64)
                expected, _ = reference.attend(q64, *there, scale=scale(sizes))
                worst.append(row_error(found[b, head], expected))
        return max(worst)

    read = sum(int(held.tokens.sum()) for held in stores)
    moved = 2 * read * sizes.width * q.itemsize + 2 * q.nbytes + 2 * (k.nbytes + v.nbytes)
    function = updates(_attend, scale=scale(sizes))
    state = tuple(held.store for held in stores)
    return Case(function, state, on_device((q, k.copy(), v.copy())), error, ROWS, moved)


def _attend(stores: Any, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> Any:
    return dispatch.decode_attention(q, k, v, stores, scale=scale)[:2]


@jax.jit
def _channels_first(k: jax.Array) -> jax.Array:
    return k.transpose(0, 1, 4, 2, 3)


def prefill_attention(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """A chunk of queries that ends at the second request's length over the keys of a prompt."""
    room, chunk, heads = sizes.pages * sizes.page, sizes.chunk, sizes.heads
    start = int(np.clip(lengths[1] - chunk, 0, room - chunk))
    shape = (heads, room, sizes.width)
    dtype = jnp.dtype(sizes.dtype)
    k, v = (rng.normal(size=shape, scale=s).astype(np.float32).astype(dtype) for s in (2, 1))
    # Finite, as they must be, and nothing that could be overlooked.
    k[:, start + chunk :], v[:, start + chunk :] = 50, 50
    q = rng.normal(size=(chunk, heads, sizes.group, sizes.width)).astype(dtype)

    def error(made: jax.Array, _: object) -> float:
        out = np.asarray(made, np.float32)
        worst = [exact(bool(np.isfinite(out).all()))]
        for at, t in enumerate((0, 1, chunk // 2, chunk - 1)):
            h, end = at % heads, start + t + 1
            q64, k64, v64 = (np.asarray(x, np.float64) for x in (q[t, h], k[h, :end], v[h, :end]))
            expected, _ = reference.attend(q64, k64, v64, scale=scale(sizes))
            worst.append(row_error(out[t, h], expected))
        return max(worst)

    function = reads(dispatch.prefill_attention, scale=scale(sizes))
    args = (*on_device((q, k.swapaxes(1, 2).copy(), v)), on_device(np.int32(start)))
    moved = 2 * heads * (start + chunk) * sizes.width * q.itemsize + 2 * q.nbytes
    # What is left of an average over 32 thousand tokens is small beside what was rounded.
    return Case(function, (), args, error, 2 * ROWS, moved)
