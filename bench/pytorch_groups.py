"""How `bench.pytorch_flexicache` keeps the KV heads of a layer: settings, two kinds of groups."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Settings:
    """unstable: of each layer its KV heads. score: a name in `pytorch_scores.SCORES`."""

    unstable: tuple[tuple[int, ...], ...]
    budget_tokens: int = 1024
    page: int = 16
    interval: int = 16
    score: str = "sketch2"

    @property
    def pages(self) -> int:
        """The budget in pages."""
        return self.budget_tokens // self.page

    @property
    def newer(self) -> int:
        """Pages that can begin between two reranks."""
        return -(-self.interval // self.page)


@dataclasses.dataclass
class Unstable:
    """Heads whose pages are all on the device. k, v: [B, K, P, page, H]."""

    heads: Tensor  # int64[K]
    k: Tensor
    v: Tensor
    state: tuple[Tensor, ...] = ()
    summaries: tuple[Tensor, ...] = ()  # [B, K, P, ...]


@dataclasses.dataclass
class Stable:
    """Heads with slots. k, v: [B, K, S, page, H]; slot_page: int64[B, K, S], -1 for none.

    host_k, host_v: [B, K, P, page, H], every full page. promoted: pages that came from there.
    """

    heads: Tensor
    k: Tensor
    v: Tensor
    slot_page: Tensor
    host_k: Tensor
    host_v: Tensor
    state: tuple[Tensor, ...] = ()
    summaries: tuple[Tensor, ...] = ()
    ranks: Tensor | None = None  # [B, K, P], by which they were filled
    resolution: Tensor | None = None  # [B, K], of these ranks: see `Sketch2.resolution`
    promoted: int = 0


def by_head(group: Unstable | Stable | None, pages: Tensor | None) -> dict[int, set[int]]:
    """pages: [B, K, n], of which those of request 0 by head."""
    if group is None or pages is None:
        return {}
    return {
        head: {page for page in mine if page >= 0}
        for head, mine in zip(group.heads.tolist(), pages[0].tolist(), strict=True)
    }
