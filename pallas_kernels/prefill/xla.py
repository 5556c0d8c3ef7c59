"""Causal attention of a chunk of queries over a dense workspace, in plain XLA.

Online softmax over blocks of keys (FlashAttention, https://arxiv.org/abs/2205.14135).
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.pallas_kernels.tiling import largest_divisor

# Of some queries: the maximum of their logits, and, relative to it, the sum of their weights and
# the weighted sum of values.
_Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
# rows [K, tiles, G * tile, H], the queries, each replaced by its result; lse [K, tiles, G * tile].
_Results: TypeAlias = tuple[jax.Array, jax.Array | None]

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
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """out [T, K, G, H], lse float32[T, K, G] or None; see `dispatch.prefill_attention`."""
    tokens, heads, group, width = q.shape
    block, tile = largest_divisor(k.shape[2], BLOCK), largest_divisor(tokens, BLOCK)
    tiles = tokens // tile
    rows = q.reshape(tiles, tile, heads, group, width).transpose(2, 0, 3, 1, 4)
    rows = rows.reshape(heads, tiles, group * tile, width) * jnp.asarray(scale, q.dtype)
    first = start + jnp.arange(tiles) * tile  # position of each tile's first query
    # Blocks that lie wholly before a tile need no mask. One bias for all heads, so that no tile
    # compares positions again: [tiles, blocks, tile, block].
    key = jnp.arange(-(-tile // block) + 1)[:, None] * block + jnp.arange(block)
    position = first[:, None] % block + jnp.arange(tile)
    bias = jnp.where(key[None, :, None] <= position[:, None, :, None], 0.0, -jnp.inf)

    def head(at: jax.Array, results: _Results) -> _Results:
        queries = results[0][at]  # [tiles, G * tile, H]

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

        def rest(t: jax.Array, results: _Results) -> _Results:
            """A tile's own blocks, behind those that the whole chunk attends to."""
            inner = first[t] // block

            def unmasked(i: jax.Array, carry: _Carry) -> _Carry:
                return attend(i, carry, queries[t], None)

            def masked(i: jax.Array, carry: _Carry) -> _Carry:
                return attend(i, carry, queries[t], bias[t, i - inner])

            carry = jax.tree.map(lambda x: x[t], before)
            carry = lax.fori_loop(start // block, inner, unmasked, carry)
            carry = lax.fori_loop(inner, (first[t] + tile + block - 1) // block, masked, carry)
            highest, total, out = carry
            rows, lse = results
            rows = rows.at[at, t].set((out / total[:, None]).astype(rows.dtype))
            return rows, None if lse is None else lse.at[at, t].set(highest + jnp.log(total))

        flat = queries.reshape(-1, width)
        lowest = jnp.full(len(flat), jnp.finfo(jnp.float32).min)
        carry = (lowest, jnp.zeros_like(lowest), jnp.zeros(flat.shape))
        carry = lax.fori_loop(0, start // block, lambda i, c: attend(i, c, flat, None), carry)
        before = jax.tree.map(lambda x: x.reshape(tiles, group * tile, *x.shape[1:]), carry)
        return lax.fori_loop(0, tiles, rest, results)

    # One head at a time: XLA's CPU compiler runs two-dimensional products a third faster than
    # batched ones, and the tile of scores stays in the cache. What comes out takes the place of the
    # queries, since an empty array to fill is copied for every layer, all at the program's start.
    lse = jnp.zeros(rows.shape[:3], jnp.float32) if return_lse else None
    out, lse = lax.fori_loop(0, heads, head, (rows, lse))
    out = out.reshape(heads, tiles, group, tile, width).transpose(1, 3, 0, 2, 4).reshape(q.shape)
    if lse is not None:
        lse = lse.reshape(heads, tiles, group, tile).transpose(1, 3, 0, 2).reshape(q.shape[:3])
    return out, lse
