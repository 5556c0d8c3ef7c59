"""`generate`: prompts in, text out, through the cache of the caller's choice."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence

from flexijax.cache.cache import CacheLayout
from flexijax.cache.memory import available_bytes, cache_bytes, request_bytes
from flexijax.config import CacheConfig
from flexijax.engine.engine import Counted, Engine, Progress, Request, Running
from flexijax.engine.prefill import Program
from flexijax.engine.requests import check_cache, make_requests, whole_number
from flexijax.engine.sampling import Sampling
from flexijax.engine.text import RunningText
from flexijax.models.config import AttentionShape
from flexijax.models.language_model import LanguageModel
from flexijax.policies.base import Policy, make
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.staleness import MOST_DIFFERENCE, Fit, HeadStability, fit
from flexijax.profiling.choose import Choice, choose
from flexijax.results import Generation, Metrics, StaleProfileWarning

# Requests decoded together when the caller names no number and memory allows.
MAX_BATCH = 8


def generate(
    lm: LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    cache: CacheConfig | None = None,
    profile: HeadProfile | str | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stream: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    max_batch: int | None = None,
) -> list[Generation]:
    """Continues every prompt; those that do not fit at once run in waves.

    prompts: texts, or token ids. max_new_tokens: each. cache: default `CacheConfig()`. profile:
    unstable heads for mode "flexi", a shipped name or a file; None looks the model up; "auto" does
    so too and, where none is shipped, measures one on the prompts (see `profiles.choose`): pass
    the result's `profile` on to measure only once. sampling: one for all or one each; default
    greedy. stream: called with (index, piece of text). progress: called with (stage, done, total).
    seed: of draws whose `Sampling` names none. max_batch: most requests decoded together.
    Returns one `Generation` per prompt, in order. Warns with `StaleProfileWarning` when the profile
    does not describe a text, see `profiles.staleness`.
    Raises ValueError before any tracing: a bad size, an empty or too long prompt, too little
    memory, a profile of another model.
    """
    cache = CacheConfig() if cache is None else cache
    check_cache(lm, cache)
    single = isinstance(prompts, str)
    requests = make_requests(lm, [prompts] if single else prompts, max_new_tokens, sampling, seed)
    if max_batch is not None:
        max_batch = whole_number("max_batch", max_batch, least=1)
    if not requests:
        return []
    choice = None
    if cache.mode == "flexi":
        choice = choose(
            lm,
            profile,
            page_size=cache.page_size,
            budget_pages=cache.budget_pages,
            prompts=[request.tokens for request in requests],
            progress=progress,
        )
    program = make_program(
        lm,
        cache,
        profile=choice.profile if choice is not None else None,
        max_tokens=max(len(r.tokens) + r.max_new_tokens for r in requests),
        rows=min(len(requests), max_batch or MAX_BATCH),
    )
    engine = Engine(lm, program, progress=progress)
    results = _run(engine, requests, stream, cache, choice)
    _warn_if_stale(results)
    return results


def make_program(
    lm: LanguageModel,
    cache: CacheConfig,
    *,
    profile: HeadProfile | str | None,
    max_tokens: int,
    rows: int,
) -> Program:
    """The static part of a run: policy, and a layout of bucketed sizes that fits the memory.

    max_tokens: of the longest request, new tokens included. rows: wanted at once; fewer where
    memory is short. Raises ValueError when not even one fits, or the profile is of another model.
    """
    shape = lm.attention
    dtype = cache.dtype or str(lm.dtype)
    found = None
    if cache.mode == "flexi":
        found = choose(
            lm, profile, page_size=cache.page_size, budget_pages=cache.budget_pages
        ).profile
    policy = make(cache, profile=found, num_layers=shape.num_layers, dtype=dtype)

    def layout(rows: int) -> CacheLayout:
        return make_layout(
            policy, shape, page_size=cache.page_size, max_tokens=max_tokens, rows=rows, dtype=dtype
        )

    rows = 1 << (rows - 1).bit_length()
    while not _fits(layout(rows), policy):
        if rows == 1:
            raise ValueError(_too_little(layout(1), policy, max_tokens))
        rows //= 2
    return Program(
        decoder=lm.decoder,
        layout=layout(rows),
        policy=policy,
        rerank_interval=cache.chunk_steps,
        implementation=cache.implementation,
        transfer=cache.transfer,
    )


def make_layout(
    policy: Policy,
    shape: AttentionShape,
    *,
    page_size: int,
    max_tokens: int,
    rows: int,
    dtype: str,
) -> CacheLayout:
    """The sizes of a cache for `rows` requests of up to max_tokens each, rounded up to buckets."""
    pages = _bucket(-(-max_tokens // page_size))
    return CacheLayout(
        shape=shape,
        paged=tuple(
            policy.paged_heads(layer, shape.num_kv_heads) for layer in range(shape.num_layers)
        ),
        rows=rows,
        blocks=rows * pages,
        pages=pages,
        slots=policy.slots(pages),
        page_size=page_size,
        offloads=policy.offloads,
        dtype=dtype,
        paced=policy.intervals is not None,
    )


def _run(
    engine: Engine,
    requests: list[Request],
    stream: Callable[[int, str], None] | None,
    cache: CacheConfig,
    choice: Choice | None,
) -> list[Generation]:
    waiting = deque(requests)
    texts = {r.index: RunningText(engine.lm.tokenizer, r.sampling.stop) for r in requests}
    done: dict[int, Generation] = {}

    def emit(index: int, piece: str) -> None:
        if stream is not None and piece:
            stream(index, piece)

    def take(running: Running, since: int) -> None:
        """Shows the tokens from `since` on, and finishes the request if it has ended."""
        request, text = running.request, texts[running.request.index]
        for at, token in enumerate(running.tokens[since:], start=since):
            if token in request.stop_ids:
                break
            emit(request.index, text.push(token))
            if text.stopped:
                del running.tokens[at + 1 :], running.logprobs[at + 1 :]
                engine.stop(running)
                break
        if not running.active:
            emit(request.index, text.finish())
            done[request.index] = _result(engine, running, text, cache, choice)
            engine.release(running)

    while waiting or engine.running:
        while waiting and engine.can_admit(waiting[0]):
            request = waiting.popleft()
            label = f"prompt {request.index + 1} of {len(requests)}"
            take(engine.admit(request, label), 0)
        if engine.running:
            before = {row: len(running.tokens) for row, running in engine.running.items()}
            for running in engine.step():
                take(running, before[running.row])
    return [done[request.index] for request in requests]


def _result(
    engine: Engine,
    running: Running,
    text: RunningText,
    cache: CacheConfig,
    choice: Choice | None,
) -> Generation:
    request, layout, policy = running.request, engine.program.layout, engine.program.policy
    stopped = running.tokens[-1] in request.stop_ids
    tokens = running.tokens[:-1] if stopped else running.tokens
    logprobs = running.logprobs[: len(tokens)]
    length = len(request.tokens) + len(running.tokens) - 1  # the last one drawn is not held
    device, summaries, host, full = request_bytes(layout, policy, length)
    counted = engine.counted(running)
    reranked = [found for found in counted.heads if found.reranks]
    overlaps = tuple((found.layer, found.head, found.overlap / found.reranks) for found in reranked)
    seen = _stability(counted, engine.program.rerank_interval)
    decode_s = running.decode_s
    metrics = Metrics(
        prompt_tokens=len(request.tokens),
        new_tokens=len(tokens),
        ttft_s=running.prefill_s,
        tpot_ms=1e3 * decode_s / max(len(running.tokens) - 1, 1),
        prefill_s=running.prefill_s,
        decode_s=decode_s,
        compile_s=engine.compiler.seconds,
        device_kv_bytes=device,
        summary_bytes=summaries,
        host_kv_bytes=host,
        full_kv_bytes=full,
        reranks=counted.reranks,
        promoted_pages=counted.promoted,
        promoted_bytes=counted.promoted * layout.page_bytes,
        offloaded_bytes=counted.offloaded * layout.page_bytes,
        mean_overlap=_mean([overlap for *_, overlap in overlaps]),
        head_overlap=overlaps,
        mean_interval=_mean([found.interval for found in seen]),
        head_rco=tuple((found.layer, found.head, found.rco) for found in seen),
        profile=choice.origin if choice is not None else None,
        profile_fit=_fit(choice.profile, seen, cache) if choice is not None else None,
    )
    return Generation(
        text=text.text,
        token_ids=tuple(tokens),
        logprobs=tuple(logprobs) if request.sampling.logprobs else None,
        finish_reason="stop" if stopped or text.stopped else "length",
        metrics=metrics,
        profile=choice.profile if choice is not None else None,
    )


def _stability(counted: Counted, steps: int) -> list[HeadStability]:
    """What was seen of the heads that had a choice; steps: of one chunk."""
    return [
        HeadStability(
            layer=found.layer,
            head=found.head,
            rco=found.rco / found.choices,
            interval=counted.reranks * steps / found.reranks,
            reranks=found.choices,
        )
        for found in counted.heads
        if found.choices
    ]


def _fit(profile: HeadProfile, seen: list[HeadStability], cache: CacheConfig) -> Fit | None:
    return fit(
        profile,
        seen,
        page_size=cache.page_size,
        budget_pages=cache.budget_pages,
        score=cache.score,
    )


def _warn_if_stale(results: Sequence[Generation]) -> None:
    """One warning for all results of a call."""
    stale = [
        (index, found)
        for index, made in enumerate(results)
        if (found := made.metrics.profile_fit) is not None and found.stale
    ]
    if stale:
        index, worst = max(stale, key=lambda entry: entry[1].difference)
        warnings.warn(
            f"the profile does not describe {len(stale)} of {len(results)} texts: the stable heads "
            f"of prompts[{index}] have a mean RCO of {worst.seen:.2f} (profile: "
            f"{worst.promised:.2f}) and differ from the profile by {worst.difference:.2f} (at most "
            f"{MOST_DIFFERENCE}); measure one on text like yours with `flexijax profile`",
            StaleProfileWarning,
            stacklevel=3,
        )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _bucket(pages: int) -> int:
    """Rounds up to an eighth of the power of two above: few programs, little waste.

    67 -> 80, 494 -> 512, 5 -> 8
    """
    power = 1 << max(pages - 1, 1).bit_length()
    step = max(power // 8, 8)
    return -(-pages // step) * step


def _fits(layout: CacheLayout, policy: Policy) -> bool:
    device, host = cache_bytes(layout, policy)
    free_device, free_host = available_bytes()
    if free_device == free_host:  # one memory
        return device + host <= 0.9 * free_device
    return device <= 0.9 * free_device and host <= 0.9 * free_host


def _too_little(layout: CacheLayout, policy: Policy, max_tokens: int) -> str:
    device, host = cache_bytes(layout, policy)
    free_device, free_host = available_bytes()
    return (
        f"{max_tokens} tokens of context need {device / 1e9:.2f} GB on the device (free: "
        f"{free_device / 1e9:.2f}) and {host / 1e9:.2f} GB on the host (free: "
        f"{free_host / 1e9:.2f}): shorten the prompt, lower budget_tokens, or use "
        "dtype='bfloat16'"
    )
