"""Causal attention of a chunk of queries over a dense workspace, for prefill."""

import jax
import jax.numpy as jnp
from jax import lax

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
      scale: factor of the logits. implementation: as elsewhere; one serves all so far.
    Returns:
      [T, K, G, H] in the dtype of q, accumulated in float32.
    """
    tokens, heads, group, width = q.shape
    size = k.shape[2]
    block = min(BLOCK, size)
    rows = q.transpose(1, 2, 0, 3).reshape(heads, group * tokens, width) * scale
    position = start + jnp.tile(jnp.arange(tokens), group)  # [G * T]

    def body(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest, total, out = carry
        # The last block of a workspace that is no multiple of it is read again from further left.
        first = jnp.minimum(i * block, size - block)
        keys = lax.dynamic_slice(k, (0, 0, first), (heads, width, block))
        values = lax.dynamic_slice(v, (0, first, 0), (heads, block, width))
        scores = jnp.einsum("KTH,KHS->KTS", rows, keys, preferred_element_type=jnp.float32)
        key = first + jnp.arange(block)
        seen = (key[None, :] <= position[:, None]) & (key >= i * block)[None, :]
        scores = jnp.where(seen[None], scores, -jnp.inf)
        new = jnp.maximum(highest, scores.max(-1))
        keep = jnp.exp(highest - new)
        weights = jnp.exp(scores - new[..., None])
        product = jnp.einsum(
            "KTS,KSH->KTH", weights.astype(v.dtype), values, preferred_element_type=jnp.float32
        )
        return new, total * keep + weights.sum(-1), out * keep[..., None] + product

    blocks = (start + tokens + block - 1) // block
    shape = (heads, group * tokens)
    highest = jnp.full(shape, jnp.finfo(jnp.float32).min)
    carry = (highest, jnp.zeros(shape), jnp.zeros((*shape, width)))
    _, total, out = lax.fori_loop(0, blocks, body, carry)
    out = (out / total[..., None]).reshape(heads, group, tokens, width)
    return out.transpose(2, 0, 1, 3).astype(q.dtype)
