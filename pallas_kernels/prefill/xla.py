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

# Queries of a head in one tile.
TILE = 512
# Keys in one block far behind a tile: larger ones rescale less often, and few queries need more of
# them for products that fill two cores. Of 64 queries behind 5,120 keys blocks of 1,024 take 0.75
# of the time of 512, of 256 queries 0.92, but of 512 queries 1.1.
BLOCK, FEW, BLOCK_OF_FEW = 512, 256, 1024
# And near the diagonal, where what is past it is work for nothing.
STEP = 256


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
    tile, step = largest_divisor(tokens, TILE), largest_divisor(k.shape[2], STEP)
    block = min(BLOCK_OF_FEW if tile <= FEW else BLOCK, k.shape[2]) // step * step
    far = start // block  # blocks
    tiles = tokens // tile
    rows = q.reshape(tiles, tile, heads, group, width).transpose(2, 0, 3, 1, 4)
    rows = rows.reshape(heads, tiles, group * tile, width) * jnp.asarray(scale, q.dtype)
    first = start + jnp.arange(tiles) * tile  # position of each tile's first query
    # Steps that lie wholly before a tile need no mask. One bias for all heads, so that no tile
    # compares positions again: [tiles, steps, tile, step].
    key = jnp.arange(-(-tile // step) + 1)[:, None] * step + jnp.arange(step)
    position = first[:, None] % step + jnp.arange(tile)
    bias = jnp.where(key[None, :, None] <= position[:, None, :, None], 0.0, -jnp.inf)

    def head(at: jax.Array, results: _Results) -> _Results:
        queries = results[0][at]  # [tiles, G * tile, H]

        def attend(
            i: jax.Array, carry: _Carry, queries: jax.Array, size: int, bias: jax.Array | None
        ) -> _Carry:
            """The i-th `size` keys."""
            highest, total, out = carry
            k_block = lax.dynamic_slice(k, (at, 0, i * size), (1, width, size))[0]
            v_block = lax.dynamic_slice(v, (at, i * size, 0), (1, size, width))[0]
            scores = jnp.matmul(queries, k_block, preferred_element_type=jnp.float32)
            if bias is not None:
                scores = (scores.reshape(group, tile, size) + bias).reshape(scores.shape)
            new = jnp.maximum(highest, scores.max(-1))
            keep = jnp.exp(highest - new)
            weights = jnp.exp(scores - new[:, None])
            product = jnp.matmul(
                weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32
            )
            return new, total * keep + weights.sum(-1), out * keep[:, None] + product

        def rest(t: jax.Array, results: _Results) -> _Results:
            """A tile's own keys, behind those that the whole chunk attends to in blocks."""
            inner = first[t] // step

            def unmasked(i: jax.Array, carry: _Carry) -> _Carry:
                return attend(i, carry, queries[t], step, None)

            def masked(i: jax.Array, carry: _Carry) -> _Carry:
                return attend(i, carry, queries[t], step, bias[t, i - inner])

            carry = jax.tree.map(lambda x: x[t], before)
            carry = lax.fori_loop(far * (block // step), inner, unmasked, carry)
            carry = lax.fori_loop(inner, (first[t] + tile + step - 1) // step, masked, carry)
            highest, total, out = carry
            rows, lse = results
            rows = rows.at[at, t].set((out / total[:, None]).astype(rows.dtype))
            return rows, None if lse is None else lse.at[at, t].set(highest + jnp.log(total))

        flat = queries.reshape(-1, width)
        lowest = jnp.full(len(flat), jnp.finfo(jnp.float32).min)
        carry = (lowest, jnp.zeros_like(lowest), jnp.zeros(flat.shape))

        def block_of(i: jax.Array, carry: _Carry) -> _Carry:
            return attend(i, carry, flat, block, None)

        carry = lax.fori_loop(0, far, block_of, carry)
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
