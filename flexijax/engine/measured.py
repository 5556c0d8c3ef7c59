"""What is measured about a request that has ended."""

from __future__ import annotations

import dataclasses
import math

from flexijax.cache.memory import request_bytes
from flexijax.config import CacheConfig
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.sequence import Request, Sequence
from flexijax.engine.stats import SequenceStats
from flexijax.policies.page_scores import name_of
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.staleness import HeadStability, ProfileFit, profile_fit
from flexijax.results import Metrics


@dataclasses.dataclass(frozen=True)
class Answering:
    """What all requests of an engine are answered with. origin: in words, of the profile."""

    cache: CacheConfig
    profile: HeadProfile | None = None
    origin: str | None = None


@dataclasses.dataclass
class Times:
    """When a request's tokens came; seconds of `clock`, which leaves out what compiling took."""

    submitted: float
    began: float | None = None
    first: float | None = None
    last: float = 0.0
    longest_gap_s: float = 0.0
    pauses: int = 0
    cached_tokens: int = 0

    @property
    def queue_s(self) -> float:
        """From submission until the prompt began to be read."""
        return 0.0 if self.began is None else self.began - self.submitted

    @property
    def ttft_s(self) -> float:
        """From submission to the first token."""
        return 0.0 if self.first is None else self.first - self.submitted

    def tokens_came(self, now: float) -> None:
        """Some tokens, at once."""
        if self.first is None:
            self.first = now
        else:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last)
        self.last = now


@dataclasses.dataclass
class EngineTotals:
    """Of all requests of an engine so far; seconds without those that compiling took.

    submitted, ended: requests, the latter for whatever reason. prompt_tokens: of prompts that were
    read; cached_tokens: of them, those that were in the cache already. new_tokens: generated.
    decode_s, prefill_s: spent on steps and on prompts. row_s: rows that held a request, summed over
    those seconds. paused: how often a row had to wait for blocks. stalled_s: spent on prompts while
    something could have decoded. promoted_bytes, offloaded_bytes, evicted_tokens: as in `Metrics`,
    of requests that have ended.
    """

    submitted: int = 0
    ended: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    row_s: float = 0.0
    paused: int = 0
    stalled_s: float = 0.0
    promoted_bytes: int = 0
    offloaded_bytes: int = 0
    evicted_tokens: int = 0

    def add_moves(self, ended: Metrics) -> None:
        """Of a request that has ended."""
        self.promoted_bytes += ended.promoted_bytes
        self.offloaded_bytes += ended.offloaded_bytes
        self.evicted_tokens += ended.evicted_tokens

    @property
    def mean_running(self) -> float:
        """Requests that held a row, on average over time."""
        return self.row_s / max(self.decode_s + self.prefill_s, 1e-9)


def metrics(
    runner: ModelRunner,
    sequence: Sequence,
    times: Times,
    *,
    new_tokens: int,
    cache: CacheConfig,
    profile: HeadProfile | None,
    origin: str | None,
) -> Metrics:
    """Of a request that is still in its row.

    new_tokens: that the caller gets. profile: that was used, None where the policy asks for none;
    origin: in words, where it came from.
    """
    request, layout = sequence.request, runner.program.model_layout
    kept, stats = request_bytes(layout, sequence.held), runner.stats(sequence)
    page_bytes = layout.moved_page_bytes
    reranked = [head for head in stats.heads if head.reranks]
    overlaps = tuple((head.layer, head.head, head.overlap / head.reranks) for head in reranked)
    observed = stability(stats, runner.program.chunk_steps)
    return Metrics(
        prompt_tokens=len(request.tokens),
        new_tokens=new_tokens,
        cached_tokens=times.cached_tokens,
        queue_s=times.queue_s,
        ttft_s=times.ttft_s,
        tpot_ms=1e3 * sequence.decode_s / max(len(sequence.tokens) - 1, 1),
        prefill_s=sequence.prefill_s,
        decode_s=sequence.decode_s,
        longest_gap_s=times.longest_gap_s,
        pauses=times.pauses,
        compile_s=runner.runner.seconds,
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
        profile_fit=_fit(runner, profile, observed, cache),
    )


def no_metrics(request: Request, times: Times, *, compile_s: float) -> Metrics:
    """Of a request that ended before it had a row."""
    return Metrics(
        prompt_tokens=len(request.tokens),
        new_tokens=0,
        cached_tokens=0,
        queue_s=times.queue_s,
        ttft_s=0.0,
        tpot_ms=0.0,
        prefill_s=0.0,
        decode_s=0.0,
        longest_gap_s=0.0,
        pauses=0,
        compile_s=compile_s,
        device_kv_bytes=0,
        summary_bytes=0,
        host_kv_bytes=0,
        full_kv_bytes=0,
        reranks=0,
        promoted_pages=0,
        promoted_bytes=0,
        offloaded_bytes=0,
        evicted_tokens=0,
        mean_overlap=None,
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
    runner: ModelRunner,
    profile: HeadProfile | None,
    observed: list[HeadStability],
    cache: CacheConfig,
) -> ProfileFit | None:
    scores = [
        group.score for *_, group in runner.program.layout.all_groups() if group.kind == "offloaded"
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


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
