"""What a page score is: what is kept of every page, in order to say which pages a query attends."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax

from flexijax.pallas_kernels.filled import in_full_pages, keys_in_blocks, keys_in_slots, set_rows
from flexijax.pallas_kernels.queries import HeadQueries


@dataclasses.dataclass(frozen=True)
class PageShape:
    """What a page of one KV head is made of. dtype: of its keys and values."""

    page_size: int  # tokens
    head_dim: int
    dtype: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Where the pages of a batch of requests lie."""

    blocks: jax.Array  # int32[B, P], the block of each page; anything beyond a request's own
    lengths: jax.Array  # int32[B], tokens of each request, 0 for a free row
    summarized: jax.Array  # int32[B], tokens of those of its pages that have a summary: full ones
    page_size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of_full_pages(cls, blocks: jax.Array, lengths: jax.Array, page_size: int) -> PageTable:
        """Where every full page has a summary."""
        return cls(blocks, lengths, in_full_pages(lengths, page_size), page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FilledPages:
    """Pages of a batch of requests that have filled up, with their keys where they lie.

    k: a pool [blocks, K, page, H], read by block, where slot_page is None; else the heads' slots
    [B, K, H, S, page]. slot_page: int32[B, K, S], the page in each slot, -1 for none. page, block:
    int32[B, E], -1 for none.
    """

    k: jax.Array
    slot_page: jax.Array | None
    page: jax.Array
    block: jax.Array


class PageScore(Protocol):
    """What is kept of pages and of requests in order to score pages, and the scores.

    A summary is what is kept of one page of one KV head. A state is what is kept of a request, for
    each KV head: fitted once, on its prompt, and read whenever one of its pages is summarised or
    scored. Both are pytrees; a score that needs no state has one without leaves. A score is a
    frozen dataclass: programs are compiled once per value.
    """

    @property
    def fit_tokens(self) -> int | None:
        """How many tokens at the beginning of a prompt `fit` reads; None: all of them."""
        ...

    def empty(self, blocks: int, heads: int, page: PageShape) -> Any:
        """Leaves [blocks, heads, ...] of unwritten summaries, in device memory.

        Raises ValueError where pages of this shape or dtype cannot be summarised.
        """
        ...

    def empty_state(self, rows: int, heads: int, page: PageShape) -> Any:
        """Leaves [rows, heads, ...] of unwritten states, in device memory."""
        ...

    def fit(self, k_pages: jax.Array, length: jax.Array) -> Any:
        """A prompt's keys [P, K, page, H], of which `length` tokens count -> leaves [K, ...]."""
        ...

    def summarize(self, k_pages: jax.Array, state: Any) -> Any:
        """Full pages [..., K, page, H] -> leaves [..., K, ...], one summary each.

        state: leaves [K, ...] with as many of the leading axes as it has, matched from the right.
        """
        ...

    def update(
        self, summaries: Any, state: Any, filled: FilledPages, *, implementation: str | None
    ) -> Any:
        """The summaries with those of pages that filled up, in their blocks' rows.

        Leaves [blocks, K, ...], to be donated; state: leaves [B, K, ...]. What `summarize` makes of
        them; `update_by_summaries` is enough where no kernel does it.
        """
        ...

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
        """q [B, K, G, H], unscaled, state [B, K, ...] -> float32[B, K, 1, P] or [B, K, G, P].

        q may come as it lies among other rows: `queries.grouped(q)` is the array.
        One score for all query heads is the page's rank. G of them are logs of the attention mass
        that each head gives to the page, up to a constant of the head; the rank is the mean share.
        -inf for pages without a summary. scale: of the logits.
        """
        ...


def update_by_summaries(
    score: PageScore,
    summaries: Any,
    state: Any,
    filled: FilledPages,
    *,
    implementation: str | None,
) -> Any:
    """`PageScore.update` by `PageScore.summarize`: keys are gathered, summaries scattered."""
    if filled.slot_page is None:
        keys, block = keys_in_blocks(filled.k, filled.block)
    else:
        keys, block = keys_in_slots(filled.k, filled.slot_page, filled.page, filled.block)
    return set_rows(summaries, block, score.summarize(keys, state))
