"""How long each offloaded head waits between two reranks, when each has its own interval."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Adaptive:
    """Doubles the interval of a head that keeps its choice, halves that of one that does not.

    shortest, longest, first: steps; each a power of two times `shortest`, which is what one decode
    chunk takes. After a rerank the head's random-corrected overlap with its choice before decides:
    at least `lengthen_at` doubles the interval, less than `shorten_at` halves it. These promote a
    third fewer pages than 16 steps for all heads, at the same divergence from full attention; see
    README. Halving below 0.3 promotes 0.57 of them, and diverges by 1 % more.
    """

    shortest: int = 8
    longest: int = 64
    first: int = 16
    lengthen_at: float = 0.6
    shorten_at: float = 0.5

    def following(self, interval: jax.Array, rco: jax.Array) -> jax.Array:
        """The next interval int32[B, K] of heads that were reranked after `interval` int32[B, K].

        rco: float32[B, K], NaN where nothing was chosen, which changes nothing.
        """
        longer = jnp.minimum(2 * interval, self.longest)
        shorter = jnp.maximum(interval // 2, self.shortest)
        kept = jnp.where(rco >= self.lengthen_at, longer, interval)
        return jnp.where(rco < self.shorten_at, shorter, kept)
