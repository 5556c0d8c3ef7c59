"""The first token of a request, from its prompt's last hidden state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexijax.engine.sampling import SamplingRows, sample, step_keys
from flexijax.models.decoder import DecoderLike, Params


@dataclasses.dataclass(frozen=True)
class FirstToken:
    """The static part of `first_token`. method: see `sampling.sample`."""

    decoder: DecoderLike
    method: str


def first_token(
    program: FirstToken, params: Params, x: jax.Array, rows: SamplingRows, seeds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of what left the last layer, x [1, D]: token int32[1], log-probability float32[1]."""
    keys = step_keys(seeds, jnp.zeros_like(rows.top_k))
    logits = first_logits(program.decoder, params, x)
    return sample(logits, rows, keys, method=program.method)


def first_logits(decoder: DecoderLike, params: Params, x: jax.Array) -> jax.Array:
    """Of what left the last layer, x [1, D]: float32[1, V]."""
    return decoder.logits(params, decoder.norm(params, x))
