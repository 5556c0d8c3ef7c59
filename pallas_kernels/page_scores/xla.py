"""Upper bounds of q.k over pages from the min and max of their keys, in plain XLA.

Sum over H of max(q*max, q*min) = min(q, 0).min + max(q, 0).max: one dot of 2H channels.
"""

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.summaries import Summaries, dequantize


def page_scores(
    q: jax.Array,
    summaries: Summaries,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
) -> jax.Array:
    """float32[B, K, P] bounds, -inf beyond each request's pages; see `dispatch.page_scores`."""
    rows = jax.tree.map(lambda leaf: jnp.take(leaf, block_table, axis=0, mode="clip"), summaries)
    bounds = dequantize(rows).astype(jnp.float32)  # [B, P, K, 2, H]
    q32 = q.astype(jnp.float32)
    signed = jnp.stack([jnp.minimum(q32, 0), jnp.maximum(q32, 0)], axis=3)  # [B, K, G, 2, H]
    scores = jnp.einsum("BKGEH,BPKEH->BKGP", signed, bounds).max(axis=2)
    inside = jnp.arange(block_table.shape[1])[None] * page_size < lengths[:, None]
    return jnp.where(inside[:, None], scores, -jnp.inf)
