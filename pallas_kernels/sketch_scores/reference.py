"""The oracles of key sketches and of page scores from them, in float64 NumPy.

They read nothing that the operation must not read, so arrays poisoned with NaN give finite results.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def hadamard(width: int) -> Array:
    """Sylvester's matrix, made orthogonal: row i, column j is (-1)**(number of bits of i & j).

    Repeated on the diagonal, each as wide as the greatest power of two that divides `width`.
    """
    block = width & -width
    one = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return np.kron(np.eye(width // block), np.array(one)) / np.sqrt(block)


def sketch_code(keys: ArrayLike, *, spacing: float) -> tuple[Array, Array]:
    """Mean of the rotated keys [S, H] and step = spacing * deviation, each [H]."""
    rotated = np.asarray(keys, np.float64) @ hadamard(np.shape(keys)[-1])
    return rotated.mean(axis=0), spacing * rotated.std(axis=0)


def sketch_levels(keys: ArrayLike, mean: ArrayLike, step: ArrayLike, *, bits: int) -> Array:
    """Which of 2**bits levels about the mean is nearest to each rotated key: [S, H], 0 lowest."""
    rotated = np.asarray(keys, np.float64) @ hadamard(np.shape(keys)[-1])
    mean, step = np.asarray(mean, np.float64), np.asarray(step, np.float64)
    lowest = mean - (2**bits - 1) / 2 * step
    return np.clip(np.round((rotated - lowest) / step), 0, 2**bits - 1)


def sketch_unpack(codes: ArrayLike, width: int) -> Array:
    """uint32[..., bits, W, page] -> levels [..., page, width]; channel 32 * w + i is bit i."""
    codes = np.asarray(codes)
    levels = np.zeros((*codes.shape[:-3], codes.shape[-1], width))
    for channel in range(width):
        word, place = divmod(channel, 32)
        for bit in range(codes.shape[-3]):
            levels[..., channel] += 2**bit * (codes[..., bit, word, :] >> np.uint32(place) & 1)
    return levels


def sketch_scores(
    weights: ArrayLike,
    offset: ArrayLike,
    unit: ArrayLike,
    codes: ArrayLike,
    block_table: ArrayLike,
    lengths: ArrayLike,
    *,
    page_size: int,
) -> Array:
    """Log of the sum over a page's tokens of exp(offset + unit * sum over H of weight * level).

    weights [B, K, G, H]; offset, unit [B, K, G]; codes uint32[blocks, K, bits, W, page];
    block_table int[B, P]; lengths int[B] -> float64[B, K, G, P], -inf where a page is not full.
    """
    weights, offset, unit = (np.asarray(x, np.float64) for x in (weights, offset, unit))
    codes, table, lengths = np.asarray(codes), np.asarray(block_table), np.asarray(lengths)
    scores = np.full((*offset.shape, table.shape[1]), -np.inf)
    for b in range(len(lengths)):
        for p in range(int(lengths[b]) // page_size):
            levels = sketch_unpack(codes[table[b, p]], weights.shape[-1])  # [K, page, H]
            products = np.einsum("KGH,KSH->KGS", weights[b], levels)
            logits = offset[b][..., None] + unit[b][..., None] * products
            peak = logits.max(axis=-1)
            scores[b, ..., p] = peak + np.log(np.exp(logits - peak[..., None]).sum(axis=-1))
    return scores
