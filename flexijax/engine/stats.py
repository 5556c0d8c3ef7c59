"""What the programs counted of one request, as plain numbers."""

from __future__ import annotations

from typing import NamedTuple

from flexijax.cache.cache import Cache
from flexijax.cache.evicting import EvictionStats
from flexijax.cache.layout import CacheLayout
from flexijax.cache.offloaded import RerankStats
from flexijax.cache.shard_layout import places_of
from flexijax.pallas_kernels import placing


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
    chunks, layers = placing.fetched(counted)
    promoted = offloaded = evicted = 0
    heads = []
    for layer, at, _ in layout.all_groups():
        stats = layers[layer][at]
        for head, place in places_of(layout, layer, at, row):
            if isinstance(stats, EvictionStats):
                evicted += int(stats.evicted[place])
            if not isinstance(stats, RerankStats):
                continue
            promoted += int(stats.promoted[place])
            offloaded += int(stats.offloaded[place])
            heads.append(
                HeadStats(
                    layer,
                    head,
                    int(stats.reranks[place]),
                    float(stats.overlap[place]),
                    float(stats.rco[place]),
                    int(stats.choices[place]),
                )
            )
    if layout.splits is not None:
        heads.sort(key=lambda head: head[:2])
    return SequenceStats(int(chunks[row]), promoted, offloaded, evicted, tuple(heads))
