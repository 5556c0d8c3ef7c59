"""`generate`: prompts in, text out, through the cache of the caller's choice."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from flexijax.config import CacheConfig
from flexijax.engine.core import EngineCore
from flexijax.engine.entry import new_entry
from flexijax.engine.measured import Answering
from flexijax.engine.mesh import check_mesh, model_of
from flexijax.engine.plan import make_program
from flexijax.engine.prefiller import PrefillResult
from flexijax.engine.program import BOUNDARY_STEPS, Program, Progress
from flexijax.engine.requests import check_cache, check_callable, check_int, make_requests
from flexijax.engine.sampling import Sampling
from flexijax.engine.sequence import Request
from flexijax.engine.stream import Stream
from flexijax.models.language_model import LanguageModel
from flexijax.profiles.staleness import MAX_DIFFERENCE
from flexijax.profiling.choose import ProfileChoice, with_profile
from flexijax.results import Generation, StaleProfileWarning

# Requests decoded together when the caller names no number and memory allows.
MAX_BATCH = 8


def generate(
    lm: LanguageModel,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    cache: CacheConfig | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stream: Callable[[int, str], None] | None = None,
    progress: Progress | None = None,
    max_batch: int | None = None,
    mesh: Mesh | None = None,
) -> list[Generation]:
    """Continues every prompt; those that do not fit at once run in waves.

    prompts: texts, or token ids. max_new_tokens: each. cache: default `CacheConfig()`. sampling:
    one for all or one each; default greedy. stream: called with (index, piece of text). progress:
    called with (stage, done, total). max_batch: most requests decoded together.
    mesh: of one axis, over whose devices the KV heads are divided; weights are moved there for this
    call, an `Engine` keeps them there.
    Returns one `Generation` per prompt, in order. Where `cache.profile` is "auto" and was measured,
    pass the result's `profile` on to measure only once. Warns with `StaleProfileWarning` when the
    profile does not describe a text, see `profiles.staleness`.
    Raises ValueError before any tracing: a bad size, an empty or too long prompt, too little
    memory, a profile of another model.
    """
    cache = CacheConfig() if cache is None else cache
    check_cache(lm, cache)
    single = isinstance(prompts, str)
    requests = make_requests(lm, [prompts] if single else prompts, max_new_tokens, sampling)
    if max_batch is not None:
        max_batch = check_int("max_batch", max_batch, minimum=1)
    mesh = check_mesh(lm, mesh)
    check_callable("stream", stream)
    check_callable("progress", progress)
    if not requests:
        return []
    texts = [request.tokens for request in requests]
    cache, choice = with_profile(lm, cache, prompts=texts, progress=progress)
    program = make_program(
        lm,
        cache,
        max_tokens=max(len(r.tokens) + r.max_new_tokens for r in requests),
        max_new_tokens=max(r.max_new_tokens for r in requests),
        batch=_batch(len(requests), max_batch or MAX_BATCH),
        sampling=[r.sampling for r in requests],
        boundary_steps=BOUNDARY_STEPS,
        mesh=mesh,
    )
    lm = model_of(lm, program)
    results = run_requests(lm, program, requests, stream, cache, choice, progress=progress)
    _warn_if_stale(results)
    return results


def _batch(requests: int, limit: int) -> int:
    """The power of two that holds all requests, or the greatest within the limit."""
    wanted = 1 << (min(requests, limit) - 1).bit_length()
    return wanted if wanted <= limit else wanted // 2


def run_requests(
    lm: LanguageModel,
    program: Program,
    requests: list[Request],
    stream: Callable[[int, str], None] | None,
    cache: CacheConfig,
    choice: ProfileChoice | None,
    *,
    progress: Progress | None,
    prompt: PrefillResult | None = None,
) -> list[Generation]:
    """All requests to their end, in waves where they do not fit at once.

    choice: the profile in use, if any. prompt: of the only request, where it has been read already.
    """
    answering = Answering(cache)
    if choice is not None:
        answering = Answering(cache, choice.profile, choice.origin)
    core = EngineCore(lm, program, answering, progress=progress, prefill_first=True)
    streams = []
    for key, request in enumerate(requests):
        answer = Stream(_nobody_waits, functools.partial(core.cancel, key))
        label = f"prompt {request.index + 1} of {len(requests)}"
        core.add(
            new_entry(
                lm,
                core.limits,
                request,
                answer,
                key=key,
                label=label,
                now=core.clock(),
                prompt=prompt,
            )
        )
        streams.append(answer)
    left = True
    while left:
        left = core.step()
        for request, answer in zip(requests, streams, strict=True):
            for piece in answer.take():
                if stream is not None:
                    stream(request.index, piece)
            if (error := answer.error) is not None:
                # Nobody waits for the others, so the program's own error is the one to see.
                raise error.__cause__ or error
    return [answer.result() for answer in streams]


def _nobody_waits(waits: Callable[[], bool]) -> None:
    """For streams that are asked when they have ended."""
    assert not waits(), "the engine has been left before its requests ended"


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
            f"of prompts[{index}] have a mean RCO of {worst.observed:.2f} (profile: "
            f"{worst.expected:.2f}) and differ from the profile by {worst.difference:.2f} (at most "
            f"{MAX_DIFFERENCE}); measure one on text like yours with `flexijax profile`",
            StaleProfileWarning,
            stacklevel=3,
        )
