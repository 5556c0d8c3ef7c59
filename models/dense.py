"""Plain dense causal attention: the oracle that every sparse path is compared with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from flexijax.models.config import AttentionShape
from flexijax.models.decoder import AttentionFn


def dense_attend(shape: AttentionShape) -> AttentionFn:
    """An attention_fn for whole sequences that start at position 0: no cache, state unused.

    out = softmax(scale * q k^T, causal) v in float32, returned in q's dtype.
    """

    def attend(
        layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any
    ) -> tuple[jax.Array, Any]:
        """q [B, T, N, H], k and v [B, T, K, H] -> out [B, T, N, H]."""
        batch, length = q.shape[:2]
        grouped = (batch, length, shape.num_kv_heads, shape.group_size, shape.head_dim)
        q32 = q.astype(jnp.float32).reshape(grouped)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", q32, k.astype(jnp.float32)) * shape.scale
        causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
        scores = jnp.where(causal[None, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v.astype(jnp.float32))
        return out.reshape(q.shape).astype(q.dtype), state

    return attend
