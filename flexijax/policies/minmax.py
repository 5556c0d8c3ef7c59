"""Pages scored by Quest's bound, from the least and greatest value of each key channel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import dispatch, platform
from flexijax.pallas_kernels.summaries import quantize, summarize


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Quest's upper bound of q.k over a page, from the elementwise min and max of its keys.

    dtype: of the summaries; "int8" shares a power-of-two scale among 32 channels.
    Source: https://arxiv.org/abs/2406.10774, equation 2.
    """

    dtype: str

    def empty(self, blocks: int, heads: int, head_dim: int) -> Any:
        """See `Score.empty`: [blocks, heads, 2, head_dim], minimum then maximum."""
        shape, device = (blocks, heads, 2, head_dim), platform.sharding()
        if self.dtype != "int8":
            return jnp.zeros(shape, self.dtype, device=device)
        leaves = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=device), leaves)

    def empty_state(self, rows: int, heads: int, head_dim: int) -> Any:
        """None is needed: see `Score`."""
        return ()

    def fit(self, k_pages: jax.Array, length: jax.Array) -> Any:
        """None is needed: see `Score`."""
        return ()

    def summarize(self, k_pages: jax.Array, state: Any = ()) -> Any:
        """See `Score.summarize`."""
        bounds = summarize(k_pages, jnp.full(k_pages.shape[:-2], k_pages.shape[-2], jnp.int32))
        return quantize(bounds) if self.dtype == "int8" else _outward(bounds, self.dtype)

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
        """See `Score.scores`."""
        return dispatch.page_scores(
            q, summaries, block_table, lengths, page_size=page_size, implementation=implementation
        )


def _outward(bounds: jax.Array, dtype: str) -> jax.Array:
    """Min and max [..., 2, H] in `dtype`, rounded away from each other: still bounds."""
    ours, theirs = jnp.finfo(dtype), jnp.finfo(bounds.dtype)
    # Both, since float16 and bfloat16, equally wide, do not hold each other's values.
    if ours.nmant >= theirs.nmant and ours.maxexp >= theirs.maxexp:
        return bounds.astype(dtype)
    rounded = bounds.astype(dtype)
    low, high = rounded[..., 0, :], rounded[..., 1, :]
    below = jnp.nextafter(low, jnp.asarray(-jnp.inf, low.dtype))
    above = jnp.nextafter(high, jnp.asarray(jnp.inf, high.dtype))
    exact_low, exact_high = (bounds[..., at, :].astype(jnp.float32) for at in (0, 1))
    low = jnp.where(low.astype(jnp.float32) > exact_low, below, low)
    high = jnp.where(high.astype(jnp.float32) < exact_high, above, high)
    return jnp.stack([low, high], axis=-2)
