"""FlexiCache: unstable heads choose at every step, stable heads are reranked from the host."""

from __future__ import annotations

import dataclasses

from flexijax.policies.base import HOST, HeadGroup, Policy, RunSpec, Tier
from flexijax.policies.page_score import PageScore
from flexijax.policies.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class Flexi(Policy):
    """Unstable heads as `Quest`; stable heads keep the budget's best pages, the host keeps all.

    score: how pages are scored. unstable: per layer, the KV heads that choose at every step; None
    takes those of the model's profile. Device bytes: S tokens of the unstable heads, the budget and
    the pages of one rerank interval of the stable ones, summaries of all pages.
    Source: FlexiCache, https://arxiv.org/abs/2511.00868.
    """

    score: PageScore = Sketch(2)
    unstable: tuple[tuple[int, ...], ...] | None = None

    @property
    def needs_profile(self) -> bool:
        """Unless the heads are named: see `Policy`."""
        return self.unstable is None

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """Unstable heads, then stable ones: see `Policy`."""
        if self.unstable is not None:
            unstable = self.unstable[layer]
        elif run.profile is not None:
            unstable = run.profile.unstable_heads(layer)
        else:
            raise ValueError("policy='flexi' needs a head profile: see CacheConfig(profile=...)")
        stable = tuple(head for head in run.all_heads if head not in unstable)
        found = []
        if unstable:
            every = (Tier(None),)
            found.append(HeadGroup(unstable, every, attends=run.budget_pages, score=self.score))
        if stable:
            ladder = (Tier(run.budget_pages), Tier(None, HOST))
            found.append(HeadGroup(stable, ladder, score=self.score, schedule=run.adaptive))
        return tuple(found)
