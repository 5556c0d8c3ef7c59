"""What a page score is: what is kept of every page, in order to say which pages a query attends."""

from __future__ import annotations

from typing import Any, Protocol

import jax


class Score(Protocol):
    """What is kept of pages and of requests in order to score pages, and the scores.

    A summary is what is kept of one page of one KV head. A state is what is kept of a request, for
    each KV head: fitted once, on its prompt, and read whenever one of its pages is summarised or
    scored. Both are pytrees; a score that needs no state has one without leaves.
    """

    def empty(self, blocks: int, heads: int, head_dim: int) -> Any:
        """Leaves [blocks, heads, ...] of unwritten summaries, in device memory."""
        ...

    def empty_state(self, rows: int, heads: int, head_dim: int) -> Any:
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
        """q [B, K, G, H], unscaled, state [B, K, ...] -> float32[B, K, P].

        -inf beyond the request; the newest page's score may be anything. scale: of the logits.
        """
        ...
