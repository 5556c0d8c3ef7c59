"""What is kept of a page to score it: the elementwise min and max of its keys, in 16 or 8 bits.

Keys at 16 (or 32) bits are one array [..., 2, H]: index 0 of the axis of two is the minimum, 1 the
maximum. At 8 bits they are a `QuantizedSummaries`: int8 values, and for each group of up to 32
channels one shared power of two, stored as its biased exponent in a byte (the MXINT8 format of the
OCP Microscaling specification). Minima are rounded down and maxima up, so scores stay upper bounds,
and powers of two make every step exact: what is read back is exactly a multiple of the scale.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

GROUP = 32
_BIAS = 127
_LARGEST = 127


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedSummaries:
    """Min and max of the keys of pages in 8 bits: value * 2**(exponent - 127).

    values: int8[..., 2, H]; exponents: uint8[..., 2, H // group_size(H)].
    """

    values: jax.Array
    exponents: jax.Array


Summaries = jax.Array | QuantizedSummaries


def group_size(head_dim: int) -> int:
    """How many channels of a key share one exponent: 32, or the power of two that divides H."""
    return math.gcd(head_dim, GROUP)


def summarize(k_pages: jax.Array, token_counts: jax.Array) -> jax.Array:
    """Elementwise min and max of the first tokens of each page.

    Args:
      k_pages: [..., page, H]; token_counts: int32[...], broadcast against the leading axes.
    Returns:
      [..., 2, H] in the dtype of `k_pages`; zeros for a page without tokens.
    """
    page = k_pages.shape[-2]
    valid = (jnp.arange(page) < token_counts[..., None])[..., None]
    low = jnp.min(jnp.where(valid, k_pages, jnp.inf), axis=-2)
    high = jnp.max(jnp.where(valid, k_pages, -jnp.inf), axis=-2)
    result = jnp.stack([low, high], axis=-2).astype(k_pages.dtype)
    return jnp.where((token_counts > 0)[..., None, None], result, jnp.zeros_like(result))


def quantize(summaries: jax.Array) -> QuantizedSummaries:
    """Rounds min and max [..., 2, H] outward to 8 bits."""
    *lead, head_dim = summaries.shape
    group = group_size(head_dim)
    grouped = summaries.astype(jnp.float32).reshape(*lead, head_dim // group, group)
    mantissa, exponent = jnp.frexp(jnp.max(jnp.abs(grouped), axis=-1))
    # The least power of two with which the group's largest magnitude is at most 127.
    exponent = exponent - 7 + (mantissa > _LARGEST / 128).astype(exponent.dtype)
    biased = jnp.where(mantissa == 0, 1, jnp.clip(exponent + _BIAS, 1, 254))
    scaled = grouped * _power_of_two(2 * _BIAS - biased)[..., None]
    low, high = jnp.floor(scaled[..., 0, :, :]), jnp.ceil(scaled[..., 1, :, :])
    # The product of a tiny number and a small scale is 0, which bounds neither side.
    low = jnp.where(grouped[..., 0, :, :] < 0, jnp.minimum(low, -1), low)
    high = jnp.where(grouped[..., 1, :, :] > 0, jnp.maximum(high, 1), high)
    values = jnp.stack([low, high], axis=-3).reshape(summaries.shape)
    return QuantizedSummaries(values.astype(jnp.int8), biased.astype(jnp.uint8))


def dequantize(summaries: Summaries) -> jax.Array:
    """Min and max [..., 2, H] as floats: an array as it is, 8 bits exactly in float32."""
    if not isinstance(summaries, QuantizedSummaries):
        return summaries
    scales = _power_of_two(summaries.exponents)
    group = group_size(summaries.values.shape[-1])
    return summaries.values.astype(jnp.float32) * jnp.repeat(scales, group, axis=-1)


def _power_of_two(biased: jax.Array) -> jax.Array:
    """2**(biased - 127) as float32 for integers 1 .. 254, exactly: the bits of the number."""
    return jax.lax.bitcast_convert_type(biased.astype(jnp.uint32) << 23, jnp.float32)
