"""Causal attention of a chunk of queries over a dense workspace, for prefill."""

import functools
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
    size = k.shape[2]
    block = math.gcd(BLOCK, size)
    rows = q.transpose(1, 2, 0, 3).reshape(heads, group * tokens, width)
    before = start // block  # blocks that lie wholly before the chunk need no mask
    masked_blocks = -(-tokens // block) + 1
    key = (before + jnp.arange(masked_blocks))[:, None, None] * block + jnp.arange(block)
    # One bias for all heads, so that no tile compares positions again.
    position = start + jnp.arange(tokens)[None, :, None]
    bias = jnp.where(key <= position, 0.0, -jnp.inf)  # [blocks, T, block]

    def head(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, keys, values = inputs  # [G * T, H], [H, S], [S, H]
        queries = queries * jnp.asarray(scale, queries.dtype)

        def attend(i: jax.Array, carry: _Carry, *, masked: bool) -> _Carry:
            highest, total, out = carry
            k_block = lax.dynamic_slice_in_dim(keys, i * block, block, axis=1)
            v_block = lax.dynamic_slice_in_dim(values, i * block, block, axis=0)
            scores = jnp.matmul(queries, k_block, preferred_element_type=jnp.float32)
            if masked:
                by_group = scores.reshape(group, tokens, block)
                scores = (by_group + bias[i - before][None]).reshape(scores.shape)
            new = jnp.maximum(highest, scores.max(-1))
            keep = jnp.exp(highest - new)
            weights = jnp.exp(scores - new[:, None])
            product = jnp.matmul(
                weights.astype(values.dtype), v_block, preferred_element_type=jnp.float32
            )
            return new, total * keep + weights.sum(-1), out * keep[:, None] + product

        lowest = jnp.full((group * tokens,), jnp.finfo(jnp.float32).min)
        carry = (lowest, jnp.zeros_like(lowest), jnp.zeros((group * tokens, width)))
        end = (start + tokens + block - 1) // block
        carry = lax.fori_loop(0, before, functools.partial(attend, masked=False), carry)
        carry = lax.fori_loop(before, end, functools.partial(attend, masked=True), carry)
        return carry[2] / carry[1][:, None]

    # One head at a time: XLA's CPU compiler runs two-dimensional products a third faster than
    # batched ones, and the tile of scores stays in the cache.
    out = lax.map(head, (rows, k, v)).reshape(heads, group, tokens, width)
    return out.transpose(2, 0, 1, 3).astype(q.dtype)
