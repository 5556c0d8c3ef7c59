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
    at least `lengthen_at` doubles the interval, less than `shorten_at` halves it. These promote
    40 % fewer pages than 16 steps for all heads, at the same divergence from full attention; see
    docs/benches.md. Halving below 0.3 promotes 0.57 of them, and diverges by 1 % more.
    Raises ValueError, naming the field, for steps or thresholds that could not work.
    """

    shortest: int = 8
    longest: int = 64
    first: int = 16
    lengthen_at: float = 0.6
    shorten_at: float = 0.5

    def __post_init__(self) -> None:
        for name in ("shortest", "longest", "first"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} of Adaptive must be a positive integer")
            times, rest = divmod(value, self.shortest)
            if rest or times & (times - 1) or value > self.longest:
                raise ValueError(
                    f"{name}={value} of Adaptive must be a power of two times "
                    f"shortest={self.shortest}, at most longest={self.longest}"
                )
        if not self.shorten_at <= self.lengthen_at:
            raise ValueError(
                f"shorten_at={self.shorten_at} of Adaptive must be at most "
                f"lengthen_at={self.lengthen_at}"
            )

    def following(self, interval: jax.Array, rco: jax.Array) -> jax.Array:
        """The next interval int32[B, K] of heads that were reranked after `interval` int32[B, K].

        rco: float32[B, K], NaN where nothing was chosen, which changes nothing.
        """
        longer = jnp.minimum(2 * interval, self.longest)
        shorter = jnp.maximum(interval // 2, self.shortest)
        kept = jnp.where(rco >= self.lengthen_at, longer, interval)
        return jnp.where(rco < self.shorten_at, shorter, kept)
