"""The oracles of moving pages between the tiers, in NumPy: copies, bit for bit."""

import numpy as np
from numpy.typing import ArrayLike


def promote(
    slots_k: ArrayLike, slots_v: ArrayLike, host_k: ArrayLike, host_v: ArrayLike, load: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """slots[b, h, s] = host[load[b, h, s], h] wherever load is not negative.

    slots_k [B, K, H, S, page]; slots_v [B, K, S, page, H]; host_k, host_v [blocks, K, page, H];
    load int[B, K, S].
    """
    new_k, new_v = np.array(slots_k), np.array(slots_v)
    host_k, host_v, load = np.asarray(host_k), np.asarray(host_v), np.asarray(load)
    for b, h, s in zip(*np.nonzero(load >= 0), strict=True):
        new_k[b, h, :, s], new_v[b, h, s] = host_k[load[b, h, s], h].T, host_v[load[b, h, s], h]
    return new_k, new_v


def offload(
    host_k: ArrayLike,
    host_v: ArrayLike,
    slots_k: ArrayLike,
    slots_v: ArrayLike,
    store_block: ArrayLike,
    store_slot: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """host[store_block[b, e], h] = slots[b, h, store_slot[b, h, e]] where neither is negative.

    host_k, host_v [blocks, K, page, H]; slots_k [B, K, H, S, page]; slots_v [B, K, S, page, H];
    store_block int[B, E]; store_slot int[B, K, E].
    """
    new_k, new_v = np.array(host_k), np.array(host_v)
    slots_k, slots_v = np.asarray(slots_k), np.asarray(slots_v)
    blocks, slots = np.asarray(store_block), np.asarray(store_slot)
    for b, h, e in np.ndindex(*slots.shape):
        if blocks[b, e] >= 0 and slots[b, h, e] >= 0:
            new_k[blocks[b, e], h] = slots_k[b, h, :, slots[b, h, e]].T
            new_v[blocks[b, e], h] = slots_v[b, h, slots[b, h, e]]
    return new_k, new_v


def offload_pages(
    host_k: ArrayLike,
    host_v: ArrayLike,
    slots_k: ArrayLike,
    slots_v: ArrayLike,
    slot_page: ArrayLike,
    page: ArrayLike,
    block: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """host[block[b, e], h] = the slot of head h that holds page[b, e], where there is one.

    slot_page: int[B, K, S], the page in each slot; page, block: int[B, E], negative for none. The
    others as in `offload`.
    """
    new_k, new_v = np.array(host_k), np.array(host_v)
    slots_k, slots_v, held = np.asarray(slots_k), np.asarray(slots_v), np.asarray(slot_page)
    page, block = np.asarray(page), np.asarray(block)
    for b, e in zip(*np.nonzero((page >= 0) & (block >= 0)), strict=True):
        for h, s in zip(*np.nonzero(held[b] == page[b, e]), strict=True):
            new_k[block[b, e], h], new_v[block[b, e], h] = slots_k[b, h, :, s].T, slots_v[b, h, s]
    return new_k, new_v
