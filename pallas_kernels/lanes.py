"""Codes and weights four to a register, as `dp4a` multiplies them: for both GPU kernels.

Of a word of 32 channels the bits s, s + 8, s + 16, s + 24 are one bit of each of four bytes. So the
channels are taken in eight groups, s = 4 * half + place: the half is shifted to the low bits of the
bytes, the place is masked where it stands. That multiplies by 2**place, which weights multiplied by
2**(2 - place) make up for at places 0 to 2; the sum over place 3, which is even, is halved.
"""

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.pallas_kernels.sketches import WORD, words

LANES = 4
GROUPS = WORD // LANES
PLACES = GROUPS // 2
ONES = 0x01010101
# A sum over all places is so many times the product.
SCALE = 4


def pack(weights: jax.Array) -> jax.Array:
    """int8[..., H], -31 to 31 -> int32[..., W, 8]; byte j of group s is channel 32 w + s + 8 j."""
    *lead, width = weights.shape
    count = words(width)
    padded = jnp.pad(weights, [(0, 0)] * len(lead) + [(0, count * WORD - width)])
    lanes = padded.reshape(*lead, count, LANES, GROUPS).swapaxes(-1, -2)
    factor = jnp.tile(jnp.array([4, 2, 1, 1], jnp.int8), 2)
    return lax.bitcast_convert_type(lanes * factor[:, None], jnp.int32)


def packed(weights: jax.Array) -> jax.Array:
    """`pack`, unless that has been done: int8[..., H] or int32[..., W, 8] -> int32[..., W, 8]."""
    return weights if weights.dtype == jnp.int32 else pack(weights)
