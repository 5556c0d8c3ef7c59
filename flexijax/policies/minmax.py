"""Pages scored by Quest's bound, from the least and greatest value of each key channel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flexijax.pallas_kernels import dispatch, platform
from flexijax.pallas_kernels.queries import HeadQueries, grouped
from flexijax.pallas_kernels.summaries import quantize, summarize
from flexijax.policies.page_score import (
    FilledPages,
    PageShape,
    PageTable,
    update_by_summaries,
)

DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class MinMax:
    """Quest's upper bound of q.k over a page, from the elementwise min and max of its keys.

    dtype: of the summaries, one of `DTYPES`; None is that of the keys, "int8" shares a power-of-two
    scale among 32 channels. Source: https://arxiv.org/abs/2406.10774, equation 2.
    Raises ValueError for another dtype.
    """

    dtype: str | None = None

    @property
    def fit_tokens(self) -> int | None:
        """Nothing is fitted: see `PageScore`."""
        return 0

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            listed = ", ".join(map(repr, DTYPES))
            raise ValueError(f"dtype={self.dtype!r} of MinMax must be None or one of {listed}")

    def empty(self, blocks: int, heads: int, page: PageShape) -> Any:
        """See `PageScore.empty`: [blocks, heads, 2, head_dim], minimum then maximum."""
        shape, device = (blocks, heads, 2, page.head_dim), platform.sharding()
        if self.dtype == "float16" != page.dtype:
            raise ValueError(
                f"summaries in dtype='float16' end at 65504, and keys in {page.dtype} do not: "
                "beyond it a bound would be infinite and its product with 0 no number; take "
                "'bfloat16' or 'int8'"
            )
        if self.dtype != "int8":
            return jnp.zeros(shape, self.dtype or page.dtype, device=device)
        leaves = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=device), leaves)

    def empty_state(self, rows: int, heads: int, page: PageShape) -> Any:
        """None is needed: see `PageScore`."""
        return ()

    def fit(self, k_pages: jax.Array, length: jax.Array) -> Any:
        """None is needed: see `PageScore`."""
        return ()

    def summarize(self, k_pages: jax.Array, state: Any = ()) -> Any:
        """See `PageScore.summarize`."""
        bounds = summarize(k_pages, jnp.full(k_pages.shape[:-2], k_pages.shape[-2], jnp.int32))
        if self.dtype == "int8":
            return quantize(bounds)
        return _outward(bounds, self.dtype or k_pages.dtype)

    def update(
        self, summaries: Any, state: Any, filled: FilledPages, *, implementation: str | None
    ) -> Any:
        """See `PageScore.update`."""
        return update_by_summaries(self, summaries, state, filled, implementation=implementation)

    def scores(
        self,
        q: jax.Array | HeadQueries,
        summaries: Any,
        state: Any,
        table: PageTable,
        *,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """See `PageScore.scores`."""
        return dispatch.page_scores(
            grouped(q),
            summaries,
            table.blocks,
            table.summarized,
            page_size=table.page_size,
            implementation=implementation,
        )[:, :, None]


def _outward(bounds: jax.Array, dtype: DTypeLike) -> jax.Array:
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
