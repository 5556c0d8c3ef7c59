"""A policy that attends to everything and writes down which pages each head would have chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.pallas_kernels.page_selection.xla import attended_first, page_ranks
from flexijax.policies.base import (
    HeadGroup,
    Policy,
    PolicyState,
    RunSpec,
    Tier,
    Tokens,
    Window,
    attention,
)
from flexijax.policies.page_score import PageScore, PageShape, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """Of one head at each of the R steps of the last chunk."""

    pages: jax.Array  # int32[R, n], best first, -1 where there were fewer
    mass: jax.Array  # float32[R, budgets], attention that the choice at each budget holds
    # float32[R, budgets]: what the choice of R steps before holds with the pages begun since, which
    # are attended by rule; NaN where there was none.
    stale_mass: jax.Array


@dataclasses.dataclass(frozen=True)
class Recording(Policy):
    """Full attention, observed: the text does not depend on what would have been chosen.

    Only page ids and shares of attention leave the device, never attention weights. budgets: pages
    that a head may choose, ascending. score: what ranks the pages, fitted on the prompt as decoding
    does it; None ranks them by the attention that they get. scale: of the logits. steps: R.
    """

    budgets: tuple[int, ...]
    page: PageShape
    score: PageScore | None
    scale: float
    steps: int

    @property
    def prompt_window(self) -> int:
        """One query: at the prompt's end the score is fitted. See `Policy`."""
        return 1

    @property
    def observes_decode(self) -> bool:
        """See `Policy`."""
        return True

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """All heads, dense: see `Policy`."""
        return (HeadGroup(run.all_heads, (Tier(None),)),)

    def init_state(self, tokens: int) -> PolicyState:
        """`Choices`, and the score's state once there is one: see `Policy`."""
        count = min(self.budgets[-1], tokens // self.page.page_size)
        none = jnp.full((self.steps, len(self.budgets)), jnp.nan)
        nothing = Choices(jnp.full((self.steps, count), -1, jnp.int32), none, none)
        return PolicyState(head=(nothing, self._unfitted()))

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """At the prompt's end fits the score, after a chunk ranks the pages: see `Policy`."""
        choices, fitted = state.head
        pages = tokens.k.reshape(-1, 1, self.page.page_size, tokens.k.shape[-1])  # [P, 1, page, H]
        if window.q.shape[1] != self.steps:
            fitted = () if self.score is None else self.score.fit(pages, tokens.length)
            return PolicyState(head=(choices, fitted))
        weights = attention(window)
        per_page = weights.reshape(*weights.shape[:2], -1, self.page.page_size).sum(-1).mean(0)
        lengths = window.position + 1  # [R], 0 for no query
        if self.score is None:
            first = jnp.arange(per_page.shape[1]) * self.page.page_size
            ranks = jnp.where(first < lengths[:, None], per_page, -jnp.inf)[:, None]
        else:
            ranks = page_ranks(self._scores(self.score, window, pages, fitted, lengths))
        size = self.page.page_size
        ranks = attended_first(ranks, lengths, lengths, page_size=size, sinks=self.sink_pages)[:, 0]
        best, ids = lax.top_k(ranks, choices.pages.shape[1])
        ids = jnp.where(best > -jnp.inf, ids, -1).astype(jnp.int32)
        page = jnp.arange(per_page.shape[1]) * size
        begun = page >= (lengths - self.steps)[:, None]
        stale = self._mass(per_page, choices.pages)
        stale += jnp.where(begun, per_page, 0.0).sum(axis=1, keepdims=True)
        stale = jnp.where(choices.pages[:, :1] >= 0, stale, jnp.nan)
        return PolicyState(head=(Choices(ids, self._mass(per_page, ids), stale), fitted))

    def _mass(self, per_page: jax.Array, ids: jax.Array) -> jax.Array:
        """float32[R, budgets] of float32[R, P] that the choice int32[R, n] at each budget holds."""
        each = jnp.take_along_axis(per_page, jnp.maximum(ids, 0), axis=1)
        held = jnp.cumsum(jnp.where(ids >= 0, each, 0.0), axis=1)
        return jnp.stack([held[:, budget - 1] for budget in self.budgets], axis=-1)

    def _scores(
        self, score: PageScore, window: Window, pages: jax.Array, fitted: Any, lengths: jax.Array
    ) -> jax.Array:
        """float32[R, 1, G, P]: each step scored as a request of its own over the same pages."""
        steps, count = lengths.shape[0], pages.shape[0]
        blocks = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (steps, count))
        return score.scores(
            window.q.swapaxes(0, 1)[:, None],
            score.summarize(pages, fitted),
            jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (steps, *leaf.shape)), fitted),
            PageTable.of_full_pages(blocks, lengths, self.page.page_size),
            scale=self.scale,
            implementation=None,
        )

    def _unfitted(self) -> Any:
        """Zeros in the form of what `fit` makes of one head."""
        if self.score is None:
            return ()
        return jax.tree.map(lambda leaf: leaf[0], self.score.empty_state(1, 1, self.page))
