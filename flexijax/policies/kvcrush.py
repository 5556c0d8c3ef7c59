"""KVCrush: the pages that gathered most attention, and some that stand for all the others."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexijax.policies.base import (
    HeadGroup,
    Policy,
    PolicyState,
    RunSpec,
    Tier,
    Tokens,
    Window,
)
from flexijax.policies.gathered import gathered, nothing_gathered


@dataclasses.dataclass(frozen=True)
class KVCrush(Policy):
    """Keeps first and newest tokens, the heaviest pages, and representatives of those that go.

    Between the first `sinks` tokens and the newest `recent` x B, whole pages of `page` tokens of
    the text are weighed by

        sum over their tokens of S[t] / n[t]

    with S the attention a token got, summed over queries and the G query heads, and n the queries
    that saw it. The heaviest stay. Each page is a row of bits: bit j says whether its token j is in
    the upper half of all these tokens by S. The anchor's bit j is 1 where more than half of the
    pages have it. Of the E pages that are not the heaviest, in the order of their Hamming distance
    to the anchor, every (E / r)-th stays, r of them: `representatives` x B tokens of whole pages,
    at least one. What room is left goes to the next by weight.

    Source: https://arxiv.org/abs/2503.00022, by the code of OpenVINO GenAI, whose defaults these
    are: 32 first and 128 newest of 672 tokens, the prompt observed by its last 8 queries; of its
    anchors the one named MEAN; one representative in 16 pages as its documentation recommends.
    What differs: there all heads of a layer share one set of pages, here each has its own; its
    maximum over 7 neighbours is not taken before adding up. Evicted every R steps. Device bytes:
    B + R tokens of every head, and 8 bytes a token.
    Raises ValueError for shares, pages or a window that cannot be.
    """

    sinks: int = 32
    recent: float = 0.19
    representatives: float = 0.0625
    page: int = 16
    window: int = 8

    def __post_init__(self) -> None:
        for name, least in (("page", 1), ("window", 1), ("sinks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.sinks % self.page:
            raise ValueError(f"sinks={self.sinks} must be a multiple of page={self.page}")
        for name in ("recent", "representatives"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 to 1")

    @property
    def prompt_window(self) -> int:
        """See `Policy`."""
        return self.window

    @property
    def observes_decode(self) -> bool:
        """See `Policy`."""
        return True

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`. Raises ValueError for a budget without room for two pages."""
        if self._pages(run.budget_tokens)[0] < 0:
            raise ValueError(
                f"budget_tokens={run.budget_tokens} of policy='kvcrush' must have room for "
                f"sinks={self.sinks}, recent={self.recent} of it, and two pages of {self.page}"
            )
        return (HeadGroup(run.all_heads, (Tier(run.budget_tokens),), unit="token"),)

    def _pages(self, room: int) -> tuple[int, int]:
        """Heavy pages and representatives that fit, whatever is in a page that has not filled."""
        fit = (room - self.sinks - int(self.recent * room) - self.page + 1) // self.page
        stand = max(int(self.representatives * room) // self.page, 1)
        return fit - stand, stand

    def init_state(self, tokens: int) -> PolicyState:
        """S and n, float32[T] each: see `Policy`."""
        return nothing_gathered(tokens)

    def observe(self, state: PolicyState, window: Window, tokens: Tokens) -> PolicyState:
        """Adds what the window's queries gave, and how many there were: see `Policy`."""
        return gathered(state, window, tokens)

    def rank_tokens(self, group: HeadGroup, state: PolicyState, tokens: Tokens) -> jax.Array:
        """2 for heavy pages, 1 for representatives, others by weight below 0: see `Policy`."""
        assert group.room is not None
        count, room, most = len(tokens.position), group.room, jnp.iinfo(jnp.int32).max
        page = tokens.position // self.page
        newest = tokens.length - int(self.recent * room)
        weighed = (tokens.position >= self.sinks) & ((page + 1) * self.page <= newest)
        heavy, stand = self._pages(room)

        # Pages are numbered 0, 1, ... in the order of the text; what is not weighed is of none.
        order = jnp.argsort(jnp.where(weighed, page, most))
        ordered = jnp.where(weighed, page, -1)[order]
        begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
        number = jnp.zeros(count, jnp.int32).at[order].set(jnp.cumsum(begins) - 1)
        number = jnp.where(weighed, number, count)

        def of_pages(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, number, num_segments=count + 1)[:-1]

        is_page = of_pages(jnp.ones(count, jnp.int32)) > 0
        pages = is_page.sum()
        share = jnp.where(weighed, state.tokens["sum"], 0.0)
        weight = of_pages(share / jnp.maximum(state.tokens["queries"], 1.0))
        by_weight = _ranks(jnp.where(is_page, -weight, jnp.inf))

        bits = weighed & (_ranks(jnp.where(weighed, -share, jnp.inf)) < weighed.sum() // 2)
        offset = tokens.position % self.page
        ones = jax.ops.segment_sum(bits.astype(jnp.int32), offset, num_segments=self.page)
        anchor = 2 * ones > pages
        distance = of_pages((bits != anchor[offset]).astype(jnp.int32))
        others = is_page & (by_weight >= heavy)
        by_distance = _ranks(jnp.where(others, distance, most))
        spread = jnp.maximum(others.sum() // stand, 1)
        stands = (by_distance % spread == 0) & (by_distance // spread < stand)

        rank = jnp.where(others & stands, 1.0, -1.0 - by_weight.astype(jnp.float32))
        rank = jnp.where(by_weight < heavy, 2.0, rank)
        return jnp.where(weighed, rank[jnp.minimum(number, count - 1)], jnp.inf)


def _ranks(values: jax.Array) -> jax.Array:
    """int32[N]: the place of each value among them, the lowest first, of equal ones the first."""
    order = jnp.argsort(values, stable=True)
    return jnp.zeros(len(values), jnp.int32).at[order].set(jnp.arange(len(values)))


def oracle(
    total: dict[int, float], queries: dict[int, float], *, page: int, heavy: int, stand: int
) -> tuple[list[int], list[int]]:
    """All pages, heaviest first, and the representatives, the nearest to the anchor first.

    total, queries: S and n of each token that is weighed, by its position.
    """
    pages: dict[int, list[int]] = {}
    for token in sorted(total):
        pages.setdefault(token // page, []).append(token)
    weights = {at: sum(total[token] / queries[token] for token in pages[at]) for at in pages}
    by_weight = sorted(pages, key=lambda at: -weights[at])
    upper = set(sorted(total, key=lambda token: -total[token])[: len(total) // 2])
    bits = {at: {token % page: token in upper for token in pages[at]} for at in pages}
    votes = [sum(row.get(j, False) for row in bits.values()) for j in range(page)]
    anchor = [vote / len(pages) > 0.5 for vote in votes]
    others = sorted(by_weight[heavy:])
    others.sort(key=lambda at: sum(bit != anchor[j] for j, bit in bits[at].items()))
    chosen = min(stand, len(others))
    return by_weight, [others[at * (len(others) // chosen)] for at in range(chosen)]
