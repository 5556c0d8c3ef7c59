"""Quest: all pages on the device, the most critical ones chosen at every step."""

from __future__ import annotations

import dataclasses

from flexijax.policies.base import HeadGroup, Policy, RunSpec, Tier
from flexijax.policies.page_score import PageScore
from flexijax.policies.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class Quest(Policy):
    """Every head attends to the budget's best pages, the first and the newest among them.

    score: how pages are scored; `MinMax()` is the paper's bound. Device bytes: all S tokens and
    the summaries of their pages. Source: https://arxiv.org/abs/2406.10774.
    """

    score: PageScore = Sketch(2)

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`."""
        every = (Tier(None),)
        return (HeadGroup(run.all_heads, every, attends=run.budget_pages, score=self.score),)
