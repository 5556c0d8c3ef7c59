"""The oracles of page scores and of the minima and maxima they come from, in float64 NumPy.

They read nothing that the operation must not read, so arrays poisoned with NaN give finite results.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def page_scores(
    q: ArrayLike,
    summaries: ArrayLike,
    block_table: ArrayLike,
    lengths: ArrayLike,
    *,
    page_size: int,
) -> Array:
    """Upper bound of q.k over each page: max over G of sum over H of max(q*max, q*min).

    Args:
      q: [B, K, G, H]; summaries: [blocks, K, 2, H] with the minimum first, then the maximum.
      block_table: int[B, P]; lengths: int[B], tokens of each request.
    Returns:
      float64[B, K, P], -inf at and beyond page ceil(length / page_size).
    """
    q, summaries = np.asarray(q, np.float64), np.asarray(summaries, np.float64)
    table, lengths = np.asarray(block_table), np.asarray(lengths)
    scores = np.full((q.shape[0], q.shape[1], table.shape[1]), -np.inf)
    for b in range(q.shape[0]):
        for p in range(min(-(-int(lengths[b]) // page_size), table.shape[1])):
            low, high = summaries[table[b, p], :, 0], summaries[table[b, p], :, 1]  # [K, H]
            bound = np.maximum(q[b] * high[:, None], q[b] * low[:, None]).sum(axis=-1)  # [K, G]
            scores[b, :, p] = bound.max(axis=-1)
    return scores


def summarize(k_pages: ArrayLike, token_counts: ArrayLike) -> Array:
    """Elementwise min and max of the first tokens of each page.

    k_pages [..., page, H], token_counts int[...] -> float64[..., 2, H]; an empty page gives zeros.
    """
    pages, counts = np.asarray(k_pages, np.float64), np.asarray(token_counts)
    result = np.zeros((*counts.shape, 2, pages.shape[-1]))
    for index in np.ndindex(*counts.shape):
        if counts[index]:
            valid = pages[index][: counts[index]]
            result[index] = np.stack([valid.min(axis=0), valid.max(axis=0)])
    return result


def quantize(summaries: ArrayLike, *, group: int) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """8-bit summaries that stay bounds: each `group` of channels shares a power of two.

    summaries [..., 2, H] -> values int8[..., 2, H], exponents uint8[..., 2, H // group] with
    summary ~ values * 2**(exponents - 127); minima are rounded down, maxima up, and the power is
    the least of 2**-126 .. 2**127 with which the group fits into -127 .. 127.
    """
    summaries = np.asarray(summaries, np.float64)
    shape = summaries.shape
    groups = summaries.reshape(*shape[:-1], shape[-1] // group, group)
    exponents = np.full(groups.shape[:-1], 1, np.uint8)
    values = np.zeros(groups.shape, np.int8)
    for index in np.ndindex(*groups.shape[:-1]):
        rounding = np.ceil if index[-2] == 1 else np.floor
        for biased in range(1, 255):
            scaled = groups[index] * 2.0 ** (127 - biased)
            if np.abs(scaled).max() <= 127:
                exponents[index], values[index] = biased, rounding(scaled)
                break
    return values.reshape(shape), exponents


def dequantize(values: ArrayLike, exponents: ArrayLike) -> Array:
    """Inverse of `quantize`, up to its outward rounding: float64[..., 2, H]."""
    values, exponents = np.asarray(values, np.float64), np.asarray(exponents, np.float64)
    return values * np.repeat(2.0 ** (exponents - 127), values.shape[-1] // exponents.shape[-1], -1)
