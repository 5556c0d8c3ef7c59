"""Pages scored by the attention mass of their tokens, from a sketch of every key."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import dispatch, platform, sketches
from flexijax.pallas_kernels.sketches import SketchCode

REDUCTIONS = ("mass", "max")


@dataclasses.dataclass(frozen=True)
class Sketch:
    """The attention that a page's keys, rounded to `bits` bits, would get.

    bits: 1, 2 or 4 of each key element. page_size: tokens a page. reduction: of the G query heads
    of a KV head; "mass" is the log of the mean over them of the page's share of attention, a
    softmax over all full pages; "max" is the greatest logarithm of the page's summed exponentials.
    The code is fitted on a request's prompt, and what is generated is rounded by the same code.
    """

    bits: int
    page_size: int
    reduction: str = "mass"

    def empty(self, blocks: int, heads: int, head_dim: int) -> Any:
        """See `Score.empty`: uint32[blocks, heads, bits, W, page]."""
        shape = (blocks, heads, self.bits, sketches.words(head_dim), self.page_size)
        return jnp.zeros(shape, jnp.uint32, device=platform.sharding())

    def empty_state(self, rows: int, heads: int, head_dim: int) -> Any:
        """See `Score.empty_state`: a `SketchCode` of leaves [rows, heads, head_dim]."""
        shape, device = (rows, heads, head_dim), platform.sharding()
        return SketchCode(
            jnp.zeros(shape, jnp.float32, device=device),
            jnp.zeros(shape, jnp.float32, device=device),
        )

    def fit(self, k_pages: jax.Array, length: jax.Array) -> Any:
        """See `Score.fit`."""
        return sketches.fit(k_pages, length, bits=self.bits)

    def summarize(self, k_pages: jax.Array, state: Any) -> Any:
        """See `Score.summarize`."""
        return sketches.encode(k_pages, state, bits=self.bits)

    def scores(
        self,
        q: jax.Array,
        summaries: Any,
        state: Any,
        block_table: jax.Array,
        lengths: jax.Array,
        *,
        page_size: int,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """See `Score.scores`; the newest page is scored once it is full."""
        logits = dispatch.sketch_scores(
            sketches.prepare(q, state, bits=self.bits, scale=scale),
            summaries,
            block_table,
            lengths,
            page_size=page_size,
            implementation=implementation,
        )
        return logits.max(axis=2) if self.reduction == "max" else log_mass(logits)


def log_mass(logits: jax.Array) -> jax.Array:
    """Log of the share of attention that each page gets, mean over the query heads.

    logits: float32[B, K, G, P], per page the log of its summed exponentials, -inf for none.
    Returns float32[B, K, P]; -inf where every query head has -inf.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    # Not inf - inf where there is no page at all.
    shares = jnp.where(jnp.isneginf(logits), -jnp.inf, logits - total)
    return jax.nn.logsumexp(shares, axis=2) - jnp.log(float(logits.shape[2]))
