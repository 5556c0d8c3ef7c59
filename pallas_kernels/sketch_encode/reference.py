"""The oracle of sketching pages that filled up, in float64 NumPy: page after page, head after head.

Nothing is read of a page that is not named, so arrays poisoned with NaN change nothing.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexijax.pallas_kernels.sketch_scores.reference import sketch_levels

Codes = NDArray[np.uint32]


def pack(levels: ArrayLike, *, bits: int) -> Codes:
    """Levels [page, H] -> uint32[bits, W, page]: bit i of word w is of channel 32 * w + i."""
    levels = np.asarray(levels, np.uint32)
    page, width = levels.shape
    planes = np.zeros((bits, -(-width // 32), page), np.uint32)
    for bit in range(bits):
        for channel in range(width):
            word, place = divmod(channel, 32)
            planes[bit, word] |= (levels[:, channel] >> np.uint32(bit) & 1) << np.uint32(place)
    return planes


def paged_encode(
    codes: ArrayLike, mean: ArrayLike, step: ArrayLike, k_pages: ArrayLike, block: ArrayLike
) -> Codes:
    """Codes [blocks, K, bits, W, page] with those of pages block[b, e] of k_pages, -1 for none.

    mean, step: [B, K, H]. k_pages: [blocks, K, page, H]. block: int[B, E].
    """
    found, mean, step, block = (
        np.array(codes),
        np.asarray(mean),
        np.asarray(step),
        np.asarray(block),
    )
    bits = found.shape[2]
    for b, e in zip(*np.nonzero(block >= 0), strict=True):
        for h in range(mean.shape[1]):
            keys = np.asarray(k_pages)[block[b, e], h]
            levels = sketch_levels(keys, mean[b, h], step[b, h], bits=bits)
            found[block[b, e], h] = pack(levels, bits=bits)
    return found


def slot_encode(
    codes: ArrayLike,
    mean: ArrayLike,
    step: ArrayLike,
    k_slots: ArrayLike,
    slot_page: ArrayLike,
    page: ArrayLike,
    block: ArrayLike,
) -> Codes:
    """As `paged_encode`, of pages page[b, e] in the slots of k_slots [B, K, H, S, page].

    slot_page: int[B, K, S], the page in each slot. A page that is in none leaves the codes alone.
    """
    found, mean, step, block = (
        np.array(codes),
        np.asarray(mean),
        np.asarray(step),
        np.asarray(block),
    )
    bits = found.shape[2]
    for b, e in zip(*np.nonzero(block >= 0), strict=True):
        for h in range(mean.shape[1]):
            for slot in np.flatnonzero(np.asarray(slot_page)[b, h] == np.asarray(page)[b, e]):
                keys = np.asarray(k_slots)[b, h, :, slot].T
                levels = sketch_levels(keys, mean[b, h], step[b, h], bits=bits)
                found[block[b, e], h] = pack(levels, bits=bits)
    return found
