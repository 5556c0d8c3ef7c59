"""From bytes to rows and blocks: both pools get what their budget leaves, not rows x pages.

    device_bytes = once + rows * row + blocks * block     and the same on the host

A request holds a row (its slots) and a block for each page, and a block takes its bytes in both
tiers, so the smaller tier decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flexijax.engine.byte_counts import in_words


@dataclasses.dataclass(frozen=True)
class TierBytes:
    """What things take in one tier, in bytes.

    block: a page in all layers and heads, with its summaries. row: the slots of one request, in all
    layers. once: what is there however many there are, by name, for messages: {"staging": ...}.
    """

    block: int
    row: int
    once: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def total(self, *, rows: int, blocks: int) -> int:
        """Bytes of so many rows and blocks, and of what is there once."""
        return sum(self.once.values()) + rows * self.row + blocks * self.block


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSizes:
    """How many rows and blocks there are, and the bytes they take, all counted."""

    rows: int
    blocks: int
    device_bytes: int
    host_bytes: int


def pool_sizes(
    device: TierBytes,
    host: TierBytes,
    *,
    device_bytes: int,
    host_bytes: int,
    max_requests: int,
    max_context: int,
    page_size: int,
    usual_context: int | None = None,
) -> PoolSizes:
    """The most rows that the budgets can keep busy, and all blocks that fit beside them.

    device_bytes, host_bytes: of each tier. max_requests: rows wanted. max_context, usual_context:
    tokens of the longest request, and of one in a full batch, None for the longest: a row is only
    made where so many blocks are left for each. Shorter requests want more rows, longer ones fewer.
    Raises ValueError, with what takes how much, when one request of max_context does not fit.
    """
    longest = -(-max_context // page_size)
    usual = min(longest, -(-(usual_context or max_context) // page_size))
    tiers = (("device", device, device_bytes), ("host", host, host_bytes))
    refused = [
        _too_little(name, tier, budget, max_context, longest)
        for name, tier, budget in tiers
        if tier.total(rows=1, blocks=longest) > budget
    ]
    if refused:
        raise ValueError("; ".join(refused))
    rows = max_requests
    for _, tier, budget in tiers:
        room = budget - tier.total(rows=0, blocks=0)
        each = tier.row + usual * tier.block
        if each:
            rows = min(rows, max(1, room // each))
        if tier.row:  # the longest has to fit whatever is usual
            rows = min(rows, (room - longest * tier.block) // tier.row)
    fitting = [
        (budget - tier.total(rows=rows, blocks=0)) // tier.block
        for _, tier, budget in tiers
        if tier.block
    ]
    blocks = min(fitting, default=rows * longest)
    return PoolSizes(
        rows=rows,
        blocks=blocks,
        device_bytes=device.total(rows=rows, blocks=blocks),
        host_bytes=host.total(rows=rows, blocks=blocks),
    )


def _too_little(name: str, tier: TierBytes, budget: int, max_context: int, blocks: int) -> str:
    """Every part of one request of max_context, and the budget."""
    parts = [f"{in_words(count)} of {part}" for part, count in tier.once.items() if count]
    parts += [f"{in_words(tier.row)} of slots"] if tier.row else []
    parts += [f"{blocks} blocks of {in_words(tier.block)}"] if tier.block else []
    return (
        f"{name}_bytes={budget} ({in_words(budget)}) is too little for one request of "
        f"max_context={max_context} tokens: {' + '.join(parts)} = "
        f"{in_words(tier.total(rows=1, blocks=blocks))}; raise {name}_bytes, or lower max_context"
    )
