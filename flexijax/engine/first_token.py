"""The first token of a request, from its prompt's last hidden state."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexijax.engine.batch import SampledTokens
from flexijax.engine.sampling import SamplingRows, most_likely, sample, step_keys
from flexijax.models.decoder import DecoderLike, Params


@dataclasses.dataclass(frozen=True)
class FirstToken:
    """The static part of `first_token`. method: see `sampling.sample`; alternatives: `Program`."""

    decoder: DecoderLike
    method: str
    alternatives: int = 0


def first_token(
    program: FirstToken, params: Params, x: jax.Array, rows: SamplingRows, seeds: jax.Array
) -> SampledTokens:
    """Of what left the last layer, x [1, D]: one step of one row."""
    keys = step_keys(seeds, jnp.zeros_like(rows.top_k))
    logits = first_logits(program.decoder, params, x)
    token, logprob = sample(logits, rows, keys, method=program.method)
    best = most_likely(logits, program.alternatives) if program.alternatives else None
    sampled = SampledTokens(token, logprob, jnp.ones_like(token, bool), best)
    return jax.tree.map(lambda leaf: leaf[None], sampled)


def first_logits(decoder: DecoderLike, params: Params, x: jax.Array) -> jax.Array:
    """Of what left the last layer, x [1, D]: float32[1, V]."""
    return decoder.logits(params, decoder.norm(params, x))
