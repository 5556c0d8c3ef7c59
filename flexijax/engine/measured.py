"""What is measured about a request that has ended."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flexijax.cache.memory import request_bytes
from flexijax.config import CacheConfig
from flexijax.engine.engine import Engine
from flexijax.engine.sequence import Sequence as Running
from flexijax.engine.stats import SequenceStats
from flexijax.policies.page_scores import name_of
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.staleness import HeadStability, ProfileFit, profile_fit
from flexijax.results import Metrics


def metrics(
    engine: Engine,
    running: Running,
    *,
    new_tokens: int,
    cache: CacheConfig,
    profile: HeadProfile | None,
    origin: str | None,
) -> Metrics:
    """Of a request that is still in its slot.

    new_tokens: that the caller gets. profile: that was used, None where the policy asks for none;
    origin: in words, where it came from.
    """
    request, layout = running.request, engine.program.layout
    kept, stats = request_bytes(layout, running.held), engine.stats(running)
    page_bytes = layout.sizes.page_bytes
    reranked = [head for head in stats.heads if head.reranks]
    overlaps = tuple((head.layer, head.head, head.overlap / head.reranks) for head in reranked)
    observed = stability(stats, engine.program.chunk_steps)
    return Metrics(
        prompt_tokens=len(request.tokens),
        new_tokens=new_tokens,
        ttft_s=running.prefill_s,
        tpot_ms=1e3 * running.decode_s / max(len(running.tokens) - 1, 1),
        prefill_s=running.prefill_s,
        decode_s=running.decode_s,
        compile_s=engine.runner.seconds,
        device_kv_bytes=kept.device,
        summary_bytes=kept.summaries,
        host_kv_bytes=kept.host,
        full_kv_bytes=kept.full,
        reranks=stats.chunks if stats.heads else 0,
        promoted_pages=stats.promoted_pages,
        promoted_bytes=stats.promoted_pages * page_bytes,
        offloaded_bytes=stats.offloaded_pages * page_bytes,
        evicted_tokens=stats.evicted_tokens,
        mean_overlap=_mean([overlap for *_, overlap in overlaps]),
        head_overlap=overlaps,
        mean_interval=_mean([head.interval for head in observed]),
        head_rco=tuple((head.layer, head.head, head.rco) for head in observed),
        profile=origin,
        profile_fit=_fit(engine, profile, observed, cache),
    )


def stability(stats: SequenceStats, chunk_steps: int) -> list[HeadStability]:
    """What was observed of the offloaded heads that had a choice."""
    return [
        HeadStability(
            layer=head.layer,
            head=head.head,
            rco=head.rco / head.choices,
            interval=stats.chunks * chunk_steps / head.reranks,
            reranks=head.choices,
        )
        for head in stats.heads
        if head.choices
    ]


def _fit(
    engine: Engine,
    profile: HeadProfile | None,
    observed: list[HeadStability],
    cache: CacheConfig,
) -> ProfileFit | None:
    scores = [
        group.score for *_, group in engine.program.layout.all_groups() if group.kind == "offloaded"
    ]
    if profile is None or not scores or scores[0] is None:
        return None
    return profile_fit(
        profile,
        observed,
        page_size=cache.page_size,
        budget_pages=cache.budget_pages,
        score=name_of(scores[0]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
