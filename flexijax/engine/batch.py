"""Where each request of a batch stands, as arrays that a decode program takes and returns."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexijax.engine.sampling import Sampling, SamplingRows

# Stop tokens a request may name; a fixed width, so that programs are compiled once.
MAX_STOP_IDS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchState:
    """One batch slot a request; a free one is inactive."""

    tokens: jax.Array  # int32[B], sampled last, not in the cache yet
    active: jax.Array  # bool[B]
    remaining: jax.Array  # int32[B], tokens it may still generate
    generated: jax.Array  # int32[B], tokens it has generated
    seeds: jax.Array  # uint32[B]
    stop_ids: jax.Array  # int32[B, stops], -1 for none
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledTokens:
    """What R steps sampled; entries of requests that had ended are not `emitted`."""

    tokens: jax.Array  # int32[R, B]
    logprobs: jax.Array  # float32[R, B]
    emitted: jax.Array  # bool[R, B]
    # The likeliest tokens, int32[R, B, n], and log-probabilities float32[R, B, n]; None unless some
    # request asks for alternatives.
    best: tuple[jax.Array, jax.Array] | None = None


def empty_batch(count: int) -> BatchState:
    """A batch in which nothing runs."""
    return BatchState(
        tokens=jnp.zeros(count, jnp.int32),
        active=jnp.zeros(count, bool),
        remaining=jnp.zeros(count, jnp.int32),
        generated=jnp.zeros(count, jnp.int32),
        seeds=jnp.zeros(count, jnp.uint32),
        stop_ids=jnp.full((count, MAX_STOP_IDS), -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * count),
    )


def nothing_sampled(shape: tuple[int, ...], alternatives: int) -> SampledTokens:
    """Of so many steps and rows, with so many likeliest tokens."""
    best, tokens = (*shape, alternatives), jnp.zeros(shape, jnp.int32)
    wanted = (jnp.zeros(best, jnp.int32), jnp.zeros(best, jnp.float32)) if alternatives else None
    return SampledTokens(tokens, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool), wanted)
