"""Pages of keys and values in 4 or 8 bits an element, each with ranges of its own.

A channel of a page's keys, and a token of its values after a Hadamard rotation, has a minimum m and
a step s: code c stands for m + s * c, c = 0 .. 2**bits - 1. Both are bfloat16 numbers, m rounded
down and s up, so that the levels cover everything they stand for at any magnitude that a float32
has, and the product of a step and a code is exact in float32: one rounding is left, and what a code
stands for is the same to the bit in every program. An element is off by at most half its step.

A range below 1e-30 counts as constant: its step is 0 and its code stands for m. Where an element is
NaN or infinite so is m or s, and the whole channel, or token, comes back as NaN or infinite: never
as a wrong number.

A page of one KV head is one row of 32-bit words, so that it is read and moved as one piece:

    keys, token after token: page * W words     W = H * bits / 32; bits i * b of word w hold channel
    ranges of the keys: H words                 i * W + w
    values, alike: page * W words
    ranges of the values: page words            the minimum in the lower half, the step in the upper

Sources: keys by channel and values by token, KIVI, https://arxiv.org/abs/2402.02750; the rotation
of values, QuaRot, https://arxiv.org/abs/2404.00456.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

WORD = 32
BITS = (4, 8)
# A range below it counts as constant: its step could come to be a number that devices flush to 0.
TINY = 1e-30


def token_words(width: int, bits: int) -> int:
    """Words that hold the codes of one token's `width` channels."""
    return width * bits // WORD


def page_words(page: int, width: int, bits: int) -> int:
    """Words of a coded page of one KV head, keys and values with their ranges."""
    return 2 * page * token_words(width, bits) + width + page


def encode(k: jax.Array, v: jax.Array, *, bits: int) -> jax.Array:
    """Pages as rows of words.

    Args:
      k, v: float[..., page, H]; v rotated by `sketches.rotate`. H: a multiple of 32 / bits.
    Returns:
      uint32[..., page_words].
    """
    *lead, _, _ = k.shape
    parts = (*_codes(k, -2, bits), *_codes(v, -1, bits))
    return jnp.concatenate([part.reshape(*lead, -1) for part in parts], axis=-1)


def decode(words: jax.Array, *, page: int, width: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """The inverse: k, v float32[..., page, H] of uint32[..., page_words], v still rotated."""
    size = page * token_words(width, bits)
    ends = (size, size + width, 2 * size + width)
    k, k_range, v, v_range = jnp.split(words, ends, axis=-1)
    keys = _values(k, k_range[..., None, :], page, width, bits)
    return keys, _values(v, v_range[..., :, None], page, width, bits)


def narrowed(x: jax.Array, dtype: str) -> jax.Array:
    """x float32 as what decoded pages are kept in; a level beyond float16's range is its end."""
    if jnp.dtype(dtype) == jnp.float16:
        most = float(jnp.finfo(jnp.float16).max)
        # The highest level may lie above the highest element; infinite ones stay so.
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)
    return x.astype(dtype)


def _codes(x: jax.Array, axis: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """Codes of x [..., page, H] in words [..., page, W], and ranges over `axis`, in words."""
    x = x.astype(jnp.float32)
    most = 2**bits - 1
    low = _rounded_down(x.min(axis, keepdims=True))
    span = x.max(axis, keepdims=True) - low
    # The least number with which the levels reach the maximum, whichever way the quotient was
    # rounded: the products are exact.
    step = _rounded_down(span / most)
    above = lax.bitcast_convert_type(_bits(step) + jnp.uint32(0x10000), jnp.float32)
    step = jnp.where(span < TINY, 0.0, jnp.where(step * most >= span, step, above))
    level = jnp.round((x - low) / jnp.where(step == 0.0, 1.0, step))
    level = jnp.clip(level, 0, most).astype(jnp.uint32)
    count, words = WORD // bits, token_words(x.shape[-1], bits)
    level = level.reshape(*x.shape[:-1], count, words)
    shift = bits * jnp.arange(count, dtype=jnp.uint32)[:, None]
    packed = (level << shift).sum(-2, dtype=jnp.uint32)
    return packed, (_bits(low) >> 16) | _bits(step)


def _values(codes: jax.Array, ranges: jax.Array, page: int, width: int, bits: int) -> jax.Array:
    """float32[..., page, H] of codes [..., page * W] and ranges that fit [..., page, H]."""
    count, words = WORD // bits, token_words(width, bits)
    shift = bits * jnp.arange(count, dtype=jnp.uint32)[:, None]
    level = codes.reshape(*codes.shape[:-1], page, 1, words) >> shift
    level = (level & jnp.uint32(2**bits - 1)).reshape(*codes.shape[:-1], page, width)
    low = lax.bitcast_convert_type(ranges << 16, jnp.float32)
    step = lax.bitcast_convert_type(ranges & jnp.uint32(0xFFFF0000), jnp.float32)
    return low + step * level.astype(jnp.int32).astype(jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint32)


def _rounded_down(x: jax.Array) -> jax.Array:
    """The greatest bfloat16 number that is not above x float32; infinities stay, and NaN."""
    kept = _bits(x) & jnp.uint32(0xFFFF0000)  # towards 0
    kept = jnp.where((kept != _bits(x)) & (x < 0), kept + jnp.uint32(0x10000), kept)
    return jnp.where(jnp.isnan(x), jnp.nan, lax.bitcast_convert_type(kept, jnp.float32))
