"""IndexCache: some layers choose pages, those behind them attend to the same ones."""

from __future__ import annotations

import dataclasses

from flexijax.policies.base import HeadGroup, Policy, RunSpec, Tier
from flexijax.policies.page_score import PageScore
from flexijax.policies.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class IndexCache(Policy):
    """As `Quest` in the layers of `choosing`; the others take over what the last of them chose.

    A layer that takes over scores nothing and has no summaries. Head k attends to the pages that
    head `heads[layer][k]` of the layer that chose has chosen; None is the head of the same number,
    which is ours: in the paper a layer chooses once for all its heads.

    choosing: ascending from 0; None is every fourth layer, which leaves out three quarters of the
    scoring, the share that the paper reports. It finds them by greedy search for the least loss on
    a calibration set, which is to be done elsewhere. score: how pages are scored.
    Device bytes: all S tokens, and the summaries of the layers that choose.
    Source: the abstract of https://arxiv.org/abs/2603.12201: full layers run the indexer of
    DeepSeek's sparse attention, shared layers reuse the indices of the nearest full one. Pages and
    their scores take the place of that trained indexer and its tokens; prefill is dense.
    Raises ValueError for layers that do not begin with 0 and ascend.
    """

    choosing: tuple[int, ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    score: PageScore = Sketch(2)

    def __post_init__(self) -> None:
        layers = self.choosing
        if layers is not None and (0 not in layers or list(layers) != sorted(set(layers))):
            raise ValueError(f"choosing={layers} must be layers that ascend from 0")

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`."""
        choosing = range(0, layer + 1, 4) if self.choosing is None else self.choosing
        source = max(one for one in choosing if one <= layer)
        every, pages = (Tier(None),), run.budget_pages
        if source == layer:
            return (HeadGroup(run.all_heads, every, attends=pages, score=self.score),)
        heads = run.all_heads if self.heads is None else self.heads[layer]
        return (HeadGroup(run.all_heads, every, attends=pages, source=(source, heads)),)
