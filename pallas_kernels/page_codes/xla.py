"""Pages of keys and values in 4 or 8 bits an element, each with ranges of its own.

Where values take 4 bits keys take 5: with 4, attention over SmolLM2's keys is off by four times as
much (0.0058 nats instead of 0.0014, mean over its heads), and by more than 4-bit values make it.

A channel of a page's keys, and a token of its values after a Hadamard rotation, has a minimum m and
a step s: code c stands for m + s * c, c = 0 .. 2**bits - 1. Both are bfloat16 numbers, m rounded
down and s up, so that the levels cover everything they stand for at any magnitude that a float32
has, and the product of a step and a code is exact in float32: one rounding is left, and what a code
stands for is the same to the bit in every program. An element is off by at most half its step.

A range below 1e-30 counts as constant: its step is 0 and its code stands for m. Where an element is
NaN or infinite so is m or s, and the whole channel, or token, comes back as NaN or infinite: never
as a wrong number.

A page of one KV head is one row of 32-bit words, so that it is read and moved as one piece:

    keys, token after token: page * W words     W = H * b / 32, b = 4 or 8; from bit i * b on word w
                                                holds channel i * W + w
    their fifth bits, where b = 4: F words      F = page * H / 32, rounded up; bit i of word w is of
                                                element i * F + w of the page
    ranges of the keys: H words                 the minimum in the lower half, the step in the upper
    values, as the keys without fifth bits: page * W words
    ranges of the values: page words

Sources: keys by channel and values by token, KIVI, https://arxiv.org/abs/2402.02750; the rotation
of values, QuaRot, https://arxiv.org/abs/2404.00456.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax

WORD = 32
BITS = (4, 8)  # of values, by which a codec is called
_KEY_BITS = {4: 5, 8: 8}
# A range below it counts as constant: its step could come to be a number that devices flush to 0.
TINY = 1e-30


def token_words(width: int, bits: int) -> int:
    """Words that hold the codes of one token's `width` channels."""
    return width * bits // WORD


def key_bits(bits: int) -> int:
    """Bits of an element of the keys, where an element of the values has `bits`."""
    return _KEY_BITS[bits]


def page_words(page: int, width: int, bits: int) -> int:
    """Words of a coded page of one KV head, keys and values with their ranges."""
    return sum(_sizes(page, width, bits))


def encode(k: jax.Array, v: jax.Array, *, bits: int) -> jax.Array:
    """Pages as rows of words.

    Args:
      k, v: float[..., page, H]; v rotated by `sketches.rotate`. H: a multiple of 32 / bits.
    Returns:
      uint32[..., page_words].
    """
    *lead, page, width = k.shape
    keys, k_range = _levels(k, -2, key_bits(bits))
    values, v_range = _levels(v, -1, bits)
    parts = [_packed(keys & jnp.uint32(2**bits - 1), bits), k_range, _packed(values, bits), v_range]
    if key_bits(bits) > bits:
        parts.insert(1, _packed_bits((keys >> bits).reshape(*lead, page * width)))
    return jnp.concatenate([part.reshape(*lead, -1) for part in parts], axis=-1)


def decode(words: jax.Array, *, page: int, width: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """The inverse: k, v float32[..., page, H] of uint32[..., page_words], v still rotated."""
    ends = list(itertools.accumulate(_sizes(page, width, bits)))[:-1]
    low, fifth, k_range, v, v_range = jnp.split(words, ends, axis=-1)
    keys = _unpacked(low, page, width, bits)
    if key_bits(bits) > bits:
        keys |= _unpacked_bits(fifth, page * width).reshape(keys.shape) << bits
    values = _unpacked(v, page, width, bits)
    return _stand_for(keys, k_range[..., None, :]), _stand_for(values, v_range[..., :, None])


def narrowed(x: jax.Array, dtype: str) -> jax.Array:
    """x float32 as what decoded pages are kept in; a level beyond float16's range is its end."""
    if jnp.dtype(dtype) == jnp.float16:
        most = float(jnp.finfo(jnp.float16).max)
        # The highest level may lie above the highest element; infinite ones stay so.
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)
    return x.astype(dtype)


def _sizes(page: int, width: int, bits: int) -> tuple[int, ...]:
    """Words of the parts of a page, in their order."""
    codes = page * token_words(width, bits)
    fifth = -(-page * width // WORD) if key_bits(bits) > bits else 0
    return codes, fifth, width, codes, page


def _levels(x: jax.Array, axis: int, bits: int) -> tuple[jax.Array, jax.Array]:
    """Codes uint32[..., page, H] of x, and ranges over `axis`, in words."""
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
    return jnp.clip(level, 0, most).astype(jnp.uint32), (_bits(low) >> 16) | _bits(step)


def _packed(level: jax.Array, bits: int) -> jax.Array:
    """uint32[..., page, W] of codes [..., page, H]."""
    count, words = WORD // bits, token_words(level.shape[-1], bits)
    level = level.reshape(*level.shape[:-1], count, words)
    return (level << _shifts(bits)).sum(-2, dtype=jnp.uint32)


def _unpacked(words: jax.Array, page: int, width: int, bits: int) -> jax.Array:
    """The inverse: codes uint32[..., page, H] of [..., page * W]."""
    level = words.reshape(*words.shape[:-1], page, 1, -1) >> _shifts(bits)
    return (level & jnp.uint32(2**bits - 1)).reshape(*words.shape[:-1], page, width)


def _packed_bits(bit: jax.Array) -> jax.Array:
    """uint32[..., ceil(n / 32)] of bits [..., n], zeros at the end."""
    spare = [(0, 0)] * (bit.ndim - 1) + [(0, -bit.shape[-1] % WORD)]
    bit = jnp.pad(bit, spare).reshape(*bit.shape[:-1], WORD, -1)
    return (bit << _shifts(1)).sum(-2, dtype=jnp.uint32)


def _unpacked_bits(words: jax.Array, count: int) -> jax.Array:
    """The inverse: uint32[..., count]."""
    bit = (words[..., None, :] >> _shifts(1)) & jnp.uint32(1)
    return bit.reshape(*words.shape[:-1], -1)[..., :count]


def _shifts(bits: int) -> jax.Array:
    return bits * jnp.arange(WORD // bits, dtype=jnp.uint32)[:, None]


def _stand_for(level: jax.Array, ranges: jax.Array) -> jax.Array:
    """float32[..., page, H] of codes, and ranges that fit them."""
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
