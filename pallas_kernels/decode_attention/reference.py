"""The oracle of a layer's decode attention, in float64 NumPy."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexijax.pallas_kernels.sparse_decode.reference import attend
from flexijax.pallas_kernels.stores import PageStore, SlotStore, Store

Array = NDArray[np.float64]


def decode_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, stores: tuple[Store, ...], *, scale: float
) -> tuple[Array, list[tuple[NDArray, NDArray]]]:
    """out [B, K, G, H], and the keys and values of every store with the new token in place.

    q [B, K, G, H], k and v [B, K, H]; stores of NumPy arrays. Rows that take no part give 0.
    """
    out = np.zeros(np.shape(q))
    kept = []
    for store in stores:
        new_k, new_v = np.array(store.k), np.array(store.v)
        for row in range(len(out)):
            for local, head in enumerate(store.heads):
                held = int(store.held[row] if np.ndim(store.held) == 1 else store.held[row, local])
                if held < 0:
                    continue
                page, offset = divmod(held, store.page_size)
                at = _address(store, row, local, page)
                new_k[_key(store, *at, offset)] = np.asarray(k)[row, head]
                new_v[(*at, offset)] = np.asarray(v)[row, head]
                keys, values = [], []
                for listed in _pages(store, row, local):
                    count = min(held + 1 - listed * store.page_size, store.page_size)
                    at = _address(store, row, local, listed)
                    keys += [new_k[_key(store, *at, token)] for token in range(count)]
                    values += [new_v[(*at, token)] for token in range(count)]
                out[row, head], _ = attend(
                    np.asarray(q, np.float64)[row, head],
                    np.array(keys, np.float64),
                    np.array(values, np.float64),
                    scale=scale,
                )
        kept.append((new_k, new_v))
    return out, kept


def _pages(store: Store, row: int, local: int) -> list[int]:
    """The pages that a head attends."""
    if isinstance(store, PageStore):
        return [int(page) for page in store.pages[row, local] if page >= 0]
    if store.slot_page is None:
        return list(range(store.v.shape[2]))
    return [int(page) for page in store.slot_page[row, local] if page >= 0]


def _address(store: Store, row: int, local: int, page: int) -> tuple[int, ...]:
    """Where a page's values lie."""
    if isinstance(store, PageStore):
        return int(store.block_table[row, page]), local
    if store.slot_page is None:
        return row, local, page
    [slot] = np.flatnonzero(np.asarray(store.slot_page)[row, local] == page)
    return row, local, int(slot)


def _key(store: Store, *at: int) -> tuple:
    """The index of a token's key: of slots, channels stand before slot and token."""
    if isinstance(store, SlotStore):
        row, local, slot, token = at
        return row, local, slice(None), slot, token
    return at
