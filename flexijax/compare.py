"""One prompt read once and answered by several caches, beside each other."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation
from flexijax.engine.plan import make_program
from flexijax.engine.prefiller import Prefiller
from flexijax.engine.program import BOUNDARY_STEPS, Progress, Runner, prefill_spec
from flexijax.engine.requests import check_cache, make_requests
from flexijax.engine.sampling import Sampling
from flexijax.generate import run_requests
from flexijax.models.language_model import LanguageModel
from flexijax.profiling.choose import with_profile
from flexijax.results import Generation


@dataclasses.dataclass(frozen=True)
class Answers:
    """The answers by name, and how far the others would have given the last one's.

    agreement: of the last answer's tokens, how many each other cache finds the most likely, fed
    that answer token by token. Two greedy texts part for good at their first difference, however
    close the models are; this compares every choice.
    """

    answers: dict[str, Generation]
    agreement: dict[str, int]


def compare(
    lm: LanguageModel,
    prompt: str | Sequence[int],
    caches: Mapping[str, CacheConfig],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stream: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Answers one prompt by each cache in turn.

    caches: of one dtype, page size and implementation, since they share what was read; the last is
    what the others are compared with. stream: called with (name, piece of text). The others as in
    `generate`. Raises ValueError as `generate` does, and where the caches cannot share a reading.
    """
    if not caches:
        raise ValueError("caches={} must name at least one")
    programs, choices, caches = {}, {}, dict(caches)
    for cache in caches.values():
        check_cache(lm, cache)
    prompts: Any = [prompt]
    request = make_requests(lm, prompts, max_new_tokens, sampling)[0]
    for name, cache in caches.items():
        caches[name], choices[name] = with_profile(
            lm, cache, prompts=[request.tokens], progress=progress
        )
        steps = -(-max_new_tokens // cache.chunk_steps) * cache.chunk_steps
        programs[name] = make_program(
            lm,
            caches[name],
            max_tokens=len(request.tokens) + steps,
            max_new_tokens=steps,
            sampling=[request.sampling],
            boundary_steps=BOUNDARY_STEPS,
            shared_reading=True,
        )
    started, runner = time.perf_counter(), Runner(progress)
    spec = prefill_spec(tuple(programs.values()))
    shared = Prefiller(lm.decoder, lm.params, spec, runner).read(request.tokens, "the prompt")
    shared.x.block_until_ready()
    read_s = time.perf_counter() - started - runner.seconds
    answers: dict[str, Generation] = {}
    for name, program in programs.items():

        def show(_: int, piece: str, name: str = name) -> None:
            if stream is not None:
                stream(name, piece)

        made = run_requests(
            lm,
            program,
            [request],
            show,
            caches[name],
            choices[name],
            progress=progress,
            prompt=shared,
        )[0]
        times = dataclasses.replace(
            made.metrics,
            prefill_s=made.metrics.prefill_s + read_s,
            ttft_s=made.metrics.ttft_s + read_s,
            compile_s=made.metrics.compile_s + runner.seconds,
        )
        answers[name] = dataclasses.replace(made, metrics=times)
    *others, last = answers
    tokens = answers[last].token_ids
    agreement = {name: Continuation(lm, programs[name], shared).agreeing(tokens) for name in others}
    return Answers(answers, agreement)
