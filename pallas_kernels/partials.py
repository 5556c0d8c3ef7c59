"""Partial attention results, each over some of the keys, and how they combine."""

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of disjoint sets of keys, from the attention over each set.

    lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i, in float32.

    Args:
      outs: float[parts, ..., H], normalized within each part.
      lses: float32[parts, ...], log of the sum of exponentiated logits; -inf for an empty part,
        whose `outs` is not read.
    Returns:
      out [..., H] in the dtype of `outs`, lse float32[...]; 0 and -inf where every part is empty.
    """
    peak = jnp.max(lses, axis=0)
    safe = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(lses - safe)
    total = jnp.sum(weights, axis=0)
    shares = (weights / jnp.where(total == 0.0, 1.0, total))[..., None]
    parts = jnp.where(shares == 0.0, 0.0, shares * outs.astype(jnp.float32))
    return jnp.sum(parts, axis=0).astype(outs.dtype), safe + jnp.log(total)
