"""Causal attention of a chunk of queries over a dense workspace, for prefill."""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.pallas_kernels import prefill_cudnn

_Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]

# Keys in one block. Blocks past the diagonal are skipped, so smaller ones waste less there; larger
# ones rescale less often.
BLOCK = 512


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale * q k^T, causal) v, where query t stands at position start + t.

    Online softmax over blocks of keys (FlashAttention, https://arxiv.org/abs/2205.14135).

    Args:
      q: float[T, K, G, H]; k: float[K, H, S], channels before tokens; v: float[K, S, H].
      start: int32[], tokens before the chunk; keys at start .. start + T - 1 are the chunk's own.
      scale: factor of the logits. implementation: None takes cuDNN where it fits, else XLA.
    Returns:
      [T, K, G, H] in the dtype of q, accumulated in float32.
    """
    if implementation != "xla" and prefill_cudnn.fits(q):
        return prefill_cudnn.prefill_attention(q, k, v, start, scale=scale)
    tokens, heads, group, width = q.shape
    block, tile = math.gcd(BLOCK, k.shape[2]), math.gcd(BLOCK, tokens)
    tiles = tokens // tile
    rows = q.reshape(tiles, tile, heads, group, width).transpose(2, 0, 3, 1, 4)
    rows = rows.reshape(heads, tiles, group * tile, width) * jnp.asarray(scale, q.dtype)
    first = start + jnp.arange(tiles) * tile  # position of each tile's first query
    # Blocks that lie wholly before a tile need no mask. One bias for all heads, so that no tile
    # compares positions again: [tiles, blocks, tile, block].
    key = jnp.arange(-(-tile // block) + 1)[:, None] * block + jnp.arange(block)
    position = first[:, None] % block + jnp.arange(tile)
    bias = jnp.where(key[None, :, None] <= position[:, None, :, None], 0.0, -jnp.inf)

    def head(at: jax.Array, rows: jax.Array) -> jax.Array:
        queries = rows[at]  # [tiles, G * tile, H]

        def attend(
            i: jax.Array, carry: _Carry, queries: jax.Array, bias: jax.Array | None
        ) -> _Carry:
            highest, total, out = carry
            k_block = lax.dynamic_slice(k, (at, 0, i * block), (1, width, block))[0]
            v_block = lax.dynamic_slice(v, (at, i * block, 0), (1, block, width))[0]
            scores = jnp.matmul(queries, k_block, preferred_element_type=jnp.float32)
            if bias is not None:
                scores = (scores.reshape(group, tile, block) + bias).reshape(scores.shape)
            new = jnp.maximum(highest, scores.max(-1))
            keep = jnp.exp(highest - new)
            weights = jnp.exp(scores - new[:, None])
            product = jnp.matmul(
                weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32
            )
            return new, total * keep + weights.sum(-1), out * keep[:, None] + product

        def rest(t: jax.Array, rows: jax.Array) -> jax.Array:
            """A tile's own blocks, behind those that the whole chunk attends to."""
            inner = first[t] // block

            def unmasked(i: jax.Array, carry: _Carry) -> _Carry:
                return attend(i, carry, queries[t], None)

            def masked(i: jax.Array, carry: _Carry) -> _Carry:
                return attend(i, carry, queries[t], bias[t, i - inner])

            carry = jax.tree.map(lambda x: x[t], before)
            carry = lax.fori_loop(start // block, inner, unmasked, carry)
            carry = lax.fori_loop(inner, (first[t] + tile + block - 1) // block, masked, carry)
            return rows.at[at, t].set((carry[2] / carry[1][:, None]).astype(rows.dtype))

        flat = queries.reshape(-1, width)
        lowest = jnp.full(len(flat), jnp.finfo(jnp.float32).min)
        carry = (lowest, jnp.zeros_like(lowest), jnp.zeros(flat.shape))
        carry = lax.fori_loop(0, start // block, lambda i, c: attend(i, c, flat, None), carry)
        before = jax.tree.map(lambda x: x.reshape(tiles, group * tile, *x.shape[1:]), carry)
        return lax.fori_loop(0, tiles, rest, rows)

    # One head at a time: XLA's CPU compiler runs two-dimensional products a third faster than
    # batched ones, and the tile of scores stays in the cache. What comes out takes the place of the
    # queries, since an empty array to fill is copied for every layer, all at the program's start.
    out = lax.fori_loop(0, heads, head, rows).reshape(heads, tiles, group, tile, width)
    return out.transpose(1, 3, 0, 2, 4).reshape(q.shape)
