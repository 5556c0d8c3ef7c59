"""The first token of a request, from its prompt's last hidden state."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flexijax.engine.sampling import SamplingRows, sample, step_keys
from flexijax.models.decoder import DecoderLike, Params


def first_token(
    decoder: DecoderLike, params: Params, x: jax.Array, rows: SamplingRows, seeds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Samples from hidden states x [1, D]: token int32[1] and log-probability float32[1]."""
    logits = decoder.logits(params, x)
    return sample(logits, rows, step_keys(seeds, jnp.zeros_like(rows.top_k)))


def first_logits(decoder: DecoderLike, params: Params, x: jax.Array) -> jax.Array:
    """Of hidden states x [1, D]: [1, V]."""
    return decoder.logits(params, x)
