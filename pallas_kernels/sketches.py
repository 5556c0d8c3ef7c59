"""What is kept of a page to score it by its tokens: every key element in 1, 2 or 4 bits.

Keys are rotated by a Hadamard matrix, which spreads outlier channels and the sinusoids of rotary
embeddings over all channels until each looks Gaussian, then rounded per channel to 2**bits evenly
spaced levels about its mean. The spacing is the best one for a Gaussian; on real keys the best
uneven levels gained nothing over it. A query is rotated the same way and rounded to 6 bits, with
which its products with codes are whole numbers: exact, and the same, in every implementation.

Codes are bit planes packed along channels: uint32[..., bits, W, page], W = ceil(H / 32), where bit
i of word w is channel 32 * w + i. Two bits a channel take exactly the room of a 16-bit minimum and
maximum in a page of 16 tokens.

Sources: rotation before rounding, https://arxiv.org/abs/2404.00456; levels, J. Max, "Quantizing for
minimum distortion", 1960, table II.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = 32
# Of a query's weights in its products with codes: -31 .. 31.
LARGEST = 31
# Spacing of 2**bits levels, in standard deviations.
SPACING = {1: 1.5958, 2: 0.9957, 4: 0.3352}
# Below this a channel is constant and its codes say nothing.
TINY = 1e-30


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SketchCode:
    """How the rotated keys of a head are rounded: level c is mean + step * (c - (2**bits - 1) / 2).

    mean, step: float32[..., H].
    """

    mean: jax.Array
    step: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SketchQuery:
    """A query against codes c: its approximate logit is offset + unit * sum over H of weight * c.

    weights: int8[B, K, G, H], or as `lanes.pack` packs them int32[B, K, G, W, 8]. offset, unit:
    float32[B, K, G].
    """

    weights: jax.Array
    offset: jax.Array
    unit: jax.Array


def words(head_dim: int) -> int:
    """Words that hold one bit of every channel of a key."""
    return -(-head_dim // WORD)


@functools.cache
def signs(width: int) -> np.ndarray:
    """Hadamard's matrix of the greatest power of two dividing `width`, repeated on the diagonal."""
    block = width & -width
    one = np.ones((1, 1), np.int8)
    while len(one) < block:
        one = np.block([[one, one], [one, -one]])
    return np.kron(np.eye(width // block, dtype=np.int8), one)


def rotate(x: jax.Array) -> jax.Array:
    """x float[..., H] times an orthogonal, symmetric matrix, in float32."""
    width = x.shape[-1]
    matrix = jnp.asarray(signs(width), x.dtype)
    rotated = jnp.einsum(
        "...H,HI->...I",
        x,
        matrix,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return rotated * float(width & -width) ** -0.5


def fit(k_pages: jax.Array, length: jax.Array, *, bits: int) -> SketchCode:
    """The code of a prompt's keys.

    Args:
      k_pages: float[P, K, page, H]; what stands behind token `length` is not read.
      length: int32[], tokens. bits: 1, 2 or 4.
    Returns:
      leaves [K, H].
    """
    pages, _, page, _ = k_pages.shape
    position = jnp.arange(pages * page, dtype=jnp.int32).reshape(pages, 1, page, 1)
    valid = position < length
    count = jnp.maximum(length, 1).astype(jnp.float32)
    rotated = rotate(k_pages)
    mean = jnp.where(valid, rotated, 0.0).sum((0, 2)) / count
    apart = jnp.where(valid, rotated - mean[None, :, None], 0.0)
    deviation = jnp.sqrt((apart * apart).sum((0, 2)) / count)
    return SketchCode(mean, jnp.maximum(deviation * SPACING[bits], TINY))


def encode(k_pages: jax.Array, code: SketchCode, *, bits: int) -> jax.Array:
    """Full pages [..., K, page, H], by codes with leaves [..., K, H] -> uint32[..., bits, W, page].

    Leading axes of `code` may be fewer: they are matched from the right.
    """
    *lead, page, width = k_pages.shape
    mean, step = (
        jnp.broadcast_to(leaf, (*lead, width))[..., None, :] for leaf in (code.mean, code.step)
    )
    half = 2 ** (bits - 1)
    level = jnp.floor((rotate(k_pages) - mean) / step) + half
    level = jnp.clip(level, 0, 2 * half - 1).astype(jnp.uint32)
    count = words(width)
    level = jnp.pad(level, [(0, 0)] * (len(lead) + 1) + [(0, count * WORD - width)])
    level = level.reshape(*lead, page, count, WORD)
    place = jnp.arange(WORD, dtype=jnp.uint32)
    planes = [
        (((level >> jnp.uint32(bit)) & jnp.uint32(1)) << place).sum(-1, dtype=jnp.uint32)
        for bit in range(bits)
    ]
    return jnp.stack(planes, axis=-3).swapaxes(-1, -2)


def prepare(q: jax.Array, code: SketchCode, *, bits: int, scale: float) -> SketchQuery:
    """Queries q float[B, K, G, H], to be multiplied with codes that have leaves [B, K, H].

    scale: factor of the logits, usually H ** -0.5.
    """
    rotated = rotate(q) * scale
    exact = rotated * code.step[:, :, None]
    unit = jnp.maximum(jnp.abs(exact).max(-1), TINY) / LARGEST
    whole = jnp.round(exact / unit[..., None])
    # Rounding errors multiply levels counted from their middle, not from the lowest.
    middle = unit * whole.sum(-1) * ((2**bits - 1) / 2)
    offset = (rotated * code.mean[:, :, None]).sum(-1) - middle
    return SketchQuery(whole.astype(jnp.int8), offset, unit)
