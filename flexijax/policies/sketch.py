"""Pages scored by the attention mass of their tokens, from a sketch of every key."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import dispatch, dispatch_rerank, platform, sketches
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.sketches import SketchCode
from flexijax.policies.page_score import FilledPages, PageShape, PageTable


@dataclasses.dataclass(frozen=True)
class Sketch:
    """The attention that a page's keys, rounded to `bits` bits, would get.

    Of the G query heads of a KV head: the log of the mean over them of the page's share of
    attention, a softmax over all full pages. bits: 1, 2 or 4 of each key element. fit_tokens: the
    code is fitted on the first so many tokens of a request's prompt, None on all of them, and what
    comes later is rounded by the same code. Raises ValueError for other bits, or no tokens.
    """

    bits: int = 2
    fit_tokens: int | None = 1024

    def __post_init__(self) -> None:
        if self.bits not in sketches.SPACING:
            raise ValueError(f"bits={self.bits!r} of Sketch must be one of {(*sketches.SPACING,)}")
        if self.fit_tokens is not None and self.fit_tokens < 1:
            raise ValueError(
                f"fit_tokens={self.fit_tokens!r} of Sketch must be at least 1, or None"
            )

    def empty(self, blocks: int, heads: int, page: PageShape) -> Any:
        """See `PageScore.empty`: uint32[blocks, heads, bits, W, page]."""
        shape = (blocks, heads, self.bits, sketches.words(page.head_dim), page.page_size)
        return jnp.zeros(shape, jnp.uint32, device=platform.sharding())

    def empty_state(self, rows: int, heads: int, page: PageShape) -> Any:
        """See `PageScore.empty_state`: a `SketchCode` of leaves [rows, heads, head_dim]."""
        shape, device = (rows, heads, page.head_dim), platform.sharding()
        return SketchCode(
            jnp.zeros(shape, jnp.float32, device=device),
            jnp.zeros(shape, jnp.float32, device=device),
        )

    def fit(self, k_pages: jax.Array, length: jax.Array) -> Any:
        """See `PageScore.fit`."""
        if self.fit_tokens is not None:
            # What is not read cannot matter: prompts alike so far have one code, to the bit.
            k_pages = k_pages[: -(-self.fit_tokens // k_pages.shape[2])]
            length = jnp.minimum(length, self.fit_tokens)
        return sketches.fit(k_pages, length, bits=self.bits)

    def summarize(self, k_pages: jax.Array, state: Any) -> Any:
        """See `PageScore.summarize`."""
        return sketches.encode(k_pages, state, bits=self.bits)

    def update(
        self, summaries: Any, state: Any, filled: FilledPages, *, implementation: str | None
    ) -> Any:
        """See `PageScore.update`: on a GPU one kernel."""
        if filled.slot_page is None:
            return dispatch_rerank.paged_encode(
                summaries, state, filled.k, filled.block, implementation=implementation
            )
        return dispatch_rerank.slot_encode(
            summaries,
            state,
            filled.k,
            filled.slot_page,
            filled.page,
            filled.block,
            implementation=implementation,
        )

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
        """See `PageScore.scores`: of each query head, the log of its summed exponentials."""
        query = dispatch.sketch_query(
            q, state, bits=self.bits, scale=scale, implementation=implementation
        )
        return dispatch.sketch_scores(
            query,
            summaries,
            table.blocks,
            table.summarized,
            page_size=table.page_size,
            implementation=implementation,
        )
