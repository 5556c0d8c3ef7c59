"""Page scores from key sketches in plain XLA, as counts of bits.

A product of whole numbers is a sum over pairs of their bits: sum over H of w * c is the sum over
bits i of w and j of c of 2**(i + j) * popcount(w_i & c_j), with 32 channels in one word. On a CPU
that is less work than unpacking codes to floats, and needs no room for them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.pallas_kernels.sketches import WORD, SketchQuery, words

# Of a weight in -31 .. 31, in two's complement.
_WEIGHT_BITS = 6


def sketch_scores(
    query: SketchQuery,
    codes: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
) -> jax.Array:
    """See `dispatch.sketch_scores`."""
    bits = codes.shape[2]
    rows = jnp.take(codes, block_table, axis=0, mode="clip")[:, :, :, None]
    planes = _planes(query.weights)  # [B, 1, K, G, 6, W]
    product = jnp.zeros((), jnp.int32)
    for bit in range(bits):
        part = jnp.zeros((), jnp.int32)
        for plane in reversed(range(_WEIGHT_BITS)):
            count = sum(
                lax.population_count(
                    rows[..., bit, word, :] & planes[..., plane, word, None]
                ).astype(jnp.int32)
                for word in range(codes.shape[3])
            )
            part = -count if plane == _WEIGHT_BITS - 1 else 2 * part + count
        product = product + (part << bit)
    unit, offset = query.unit[:, None, ..., None], query.offset[:, None, ..., None]
    logits = product.astype(jnp.float32) * unit + offset  # [B, P, K, G, page]
    # Kept apart, or the compiler counts all bits once more for each of the two reductions.
    logits = lax.optimization_barrier(logits)
    highest = lax.optimization_barrier(logits.max(-1, keepdims=True))
    weights = lax.optimization_barrier(jnp.exp(logits - highest))
    scores = jnp.log(weights.sum(-1)) + highest[..., 0]
    full = jnp.arange(1, block_table.shape[1] + 1)[None] * page_size <= lengths[:, None]
    return jnp.where(full[..., None, None], scores, -jnp.inf).transpose(0, 2, 3, 1)


def _planes(weights: jax.Array) -> jax.Array:
    """Bits of weights int8[B, K, G, H] as uint32[B, 1, K, G, 6, W], packed as codes are."""
    *lead, width = weights.shape
    count = words(width)
    padded = jnp.pad(weights, [(0, 0)] * len(lead) + [(0, count * WORD - width)])
    padded = padded.astype(jnp.int32).reshape(*lead, 1, count, WORD)
    plane = jnp.arange(_WEIGHT_BITS, dtype=jnp.int32)[:, None, None]
    bit = ((padded >> plane) & 1).astype(jnp.uint32)
    packed = (bit << jnp.arange(WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    return packed[:, None]
