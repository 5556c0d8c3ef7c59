"""What the programs counted of one request, as plain numbers."""

from __future__ import annotations

from typing import NamedTuple

import jax

from flexijax.cache.cache import Cache
from flexijax.cache.evicting import EvictionStats
from flexijax.cache.layout import CacheLayout
from flexijax.cache.offloaded import RerankStats


class HeadStats(NamedTuple):
    """One offloaded head of a request; fields as in `cache.offloaded.RerankStats`."""

    layer: int
    head: int
    reranks: int
    overlap: float
    rco: float
    choices: int


class SequenceStats(NamedTuple):
    """What was counted of a request since its prompt came.

    chunks: of R decode steps. promoted_pages: host to device; offloaded_pages: device to host.
    evicted_tokens: dropped for good, summed over KV heads, those of the prompt among them.
    """

    chunks: int
    promoted_pages: int
    offloaded_pages: int
    evicted_tokens: int
    heads: tuple[HeadStats, ...]


def sequence_stats(layout: CacheLayout, cache: Cache, *, row: int) -> SequenceStats:
    """Of the request in that row of the batch."""
    bank, row = divmod(row, layout.sizes.bank_rows)
    mine = cache.banks[bank]
    counted = (mine.standing.chunks, [layer.stats for layer in mine.layers])
    chunks, layers = jax.device_get(counted)
    promoted = offloaded = evicted = 0
    heads = []
    for layer, at, group in layout.all_groups():
        stats = layers[layer][at]
        if isinstance(stats, EvictionStats):
            evicted += int(stats.evicted[row].sum())
        if not isinstance(stats, RerankStats):
            continue
        promoted += int(stats.promoted[row].sum())
        offloaded += int(stats.offloaded[row].sum())
        heads += [
            HeadStats(
                layer,
                head,
                int(stats.reranks[row, index]),
                float(stats.overlap[row, index]),
                float(stats.rco[row, index]),
                int(stats.choices[row, index]),
            )
            for index, head in enumerate(group.heads)
        ]
    return SequenceStats(int(chunks[row]), promoted, offloaded, evicted, tuple(heads))
