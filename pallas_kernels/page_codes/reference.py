"""The oracle of coded pages, in NumPy and float64, from the formula in `xla.py`."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def hadamard(width: int) -> Array:
    """Sylvester's matrix of the greatest power of two in `width`, along the diagonal, orthogonal.

    Entry (i, j) of a block is -1 to the number of ones that i and j have in common.
    """
    block = width & -width
    one = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return np.kron(np.eye(width // block), np.array(one)) / np.sqrt(block)


def bfloat16_grid(x: float, *, up: bool) -> float:
    """The nearest number of 8 significant bits that is not below x (up), or not above it."""
    if x == 0:
        return 0.0
    unit = 2.0 ** (np.floor(np.log2(abs(x))) - 7)
    return float((np.ceil if up else np.floor)(x / unit) * unit)


def levels(x: ArrayLike, *, bits: int) -> tuple[NDArray[np.int64], float, float]:
    """Of elements with one range: their codes, the minimum m and the step s.

    m = x.min() rounded down, s = (x.max() - m) / (2**bits - 1) rounded up, code round((x - m) / s).
    """
    x = np.asarray(x, np.float64)
    low = bfloat16_grid(x.min(), up=False)
    step = bfloat16_grid((x.max() - low) / (2**bits - 1), up=True)
    codes = np.zeros(x.shape) if step == 0 else np.round((x - low) / step)
    return np.clip(codes, 0, 2**bits - 1).astype(np.int64), low, step


def approximated(x: ArrayLike, *, axis: int, bits: int) -> tuple[Array, Array]:
    """x with each element at its level, and each element's step; ranges over `axis`."""
    x = np.asarray(x, np.float64)
    made, steps = np.empty(x.shape), np.empty(x.shape)
    for at in np.ndindex(*np.delete(np.array(x.shape), axis % x.ndim)):
        line = (*at[: axis % x.ndim], slice(None), *at[axis % x.ndim :])
        code, low, step = levels(x[line], bits=bits)
        made[line], steps[line] = low + step * code, step
    return made, steps


def words_of(k: ArrayLike, v: ArrayLike, *, bits: int) -> NDArray[np.uint32]:
    """A page of one KV head as `codes.encode` lays it out: k, v [page, H], v rotated."""
    found: list[int] = []
    for x, by_channel in ((np.asarray(k), True), (np.asarray(v), False)):
        page, width = x.shape
        per_word = 32 // bits
        words = width // per_word
        lines = x.T if by_channel else x
        wide = 5 if by_channel and bits == 4 else bits
        coded = [levels(line, bits=wide) for line in lines]
        codes = np.array([code for code, *_ in coded])
        codes = codes.T if by_channel else codes
        for token in range(page):
            for word in range(words):
                held = (codes[token, i * words + word] % 2**bits for i in range(per_word))
                found.append(sum(int(code) << bits * i for i, code in enumerate(held)))
        if wide > bits:
            fifth = [int(code) >> bits for code in codes.ravel()]
            count = -(-len(fifth) // 32)
            for word in range(count):
                found.append(sum(bit << i for i, bit in enumerate(fifth[word::count])))
        for _, low, step in coded:
            low_bits, step_bits = np.array([low, step], np.float32).view(np.uint32) >> 16
            found.append(int(low_bits) | int(step_bits) << 16)
    return np.array(found, np.uint32)
