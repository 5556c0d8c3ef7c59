"""What an engine holds at a boundary: requests, both tiers, and what has moved between them."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

from flexijax.cache.cache import abstract
from flexijax.cache.layout import CacheLayout
from flexijax.cache.memory import cache_bytes, nbytes, request_bytes
from flexijax.engine.boundary import Stage
from flexijax.engine.core import EngineCore
from flexijax.policies.base import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occupancy:
    """Of an engine at one moment.

    waiting, reading, running, paused: requests. blocks: of the pools;
    used_blocks: that requests hold; cached_blocks: whose tokens are known, held or not.
    device_bytes, host_bytes: of the arrays of each tier, over a mesh those of each device; of them
    what requests fill: device_used,
    host_used, of what prompts share counted once. promoted_bytes, offloaded_bytes, evicted_tokens:
    so far, of requests that ended and of those that run. overlap: of the pages that those that run
    have chosen at reranks, the share that was on the device already; None before the first rerank.
    prefix_queries, prefix_hits: tokens of prompts that were looked up, and that were known.
    """

    waiting: int
    reading: int
    running: int
    paused: int
    rows: int
    blocks: int
    used_blocks: int
    cached_blocks: int
    device_bytes: int
    device_used: int
    host_bytes: int
    host_used: int
    promoted_bytes: int
    offloaded_bytes: int
    evicted_tokens: int
    overlap: float | None
    prefix_queries: int
    prefix_hits: int


def occupancy(core: EngineCore, submitted: int) -> Occupancy:
    """Of an engine between two steps. submitted: requests that it has not looked at yet."""
    program, pool = core.runner.program, core.pool
    layout, totals = program.layout, core.totals
    states = [entry.state for entry in core.entries.values()]
    stages = Counter(state.stage for state in states)
    used = layout.sizes.blocks - pool.num_free
    sizes = _sizes(layout, program.policy)
    device_used, host_used = used * sizes.device_block, used * sizes.host_block
    promoted = offloaded = evicted = reranks = 0
    overlap = 0.0
    for entry in core.entries.values():
        tokens = entry.state.tokens
        if entry.state.admitted and tokens:
            pages = -(-tokens // layout.sizes.page_size)
            whole = request_bytes(layout, tokens).device
            device_used += max(0, whole - pages * sizes.device_block)
        if entry.state.stage not in (Stage.RUNNING, Stage.PAUSED) or entry.sequence is None:
            continue
        stats = core.runner.stats(entry.sequence)
        promoted += stats.promoted_pages
        offloaded += stats.offloaded_pages
        evicted += stats.evicted_tokens
        reranks += sum(head.reranks for head in stats.heads)
        overlap += sum(head.overlap for head in stats.heads)
    return Occupancy(
        waiting=stages[Stage.WAITING] + submitted,
        reading=stages[Stage.READING],
        running=stages[Stage.RUNNING],
        paused=stages[Stage.PAUSED],
        rows=layout.sizes.batch,
        blocks=layout.sizes.blocks,
        used_blocks=used,
        cached_blocks=pool.num_cached,
        device_bytes=sizes.device,
        device_used=min(device_used, sizes.device),
        host_bytes=sizes.host,
        host_used=min(host_used, sizes.host),
        promoted_bytes=totals.promoted_bytes + promoted * layout.moved_page_bytes,
        offloaded_bytes=totals.offloaded_bytes + offloaded * layout.moved_page_bytes,
        evicted_tokens=totals.evicted_tokens + evicted,
        overlap=overlap / reranks if reranks else None,
        prefix_queries=pool.counts.prompt_tokens,
        prefix_hits=pool.counts.hit_tokens,
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Bytes of the arrays of a cache in each tier, and of them those of one block."""

    device: int
    host: int
    device_block: int
    host_block: int


@functools.lru_cache(maxsize=8)
def _sizes(layout: CacheLayout, policy: Policy) -> _Sizes:
    pools, blocks = abstract(layout, policy).all_pools, layout.sizes.blocks
    device, host = cache_bytes(layout, policy)
    by_block = nbytes([layer.groups for layer in pools])
    return _Sizes(device, host, by_block // blocks, host // blocks)
