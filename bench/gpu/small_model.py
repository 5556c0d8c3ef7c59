"""A small random model through the whole product: its tokens, and what its tiers hold."""

from __future__ import annotations

import contextlib

import jax
import numpy as np

from bench.gpu.models import cache_for, greedy_request, random_model, random_tokens
from bench.gpu.report import Part
from bench.gpu.sizes import Sizes
from bench.gpu.tiers_equal import compared_pages
from flexijax.cache.tiers import HostPages
from flexijax.config import CacheConfig
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import bucket, make_program
from flexijax.engine.sequence import Request
from flexijax.generate import run_requests
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform

STEPS = 64
RERANKS = 5


def tokens(part: Part, sizes: Sizes) -> None:
    """With a budget for the whole context `flexi` says what `full` says, token by token.

    In float32 at full precision: rounding to less would make other tokens the most likely ones.
    """
    lm = random_model(sizes.small, name="small", dtype="float32")
    roomy = bucket(-(-(max(sizes.prompts) + STEPS) // sizes.page))
    # A CPU knows no other precision, and compiles the same programs for the other parts.
    highest = jax.default_matmul_precision("highest")
    made: dict[str, list[tuple[int, ...]]] = {}
    with highest if platform.is_gpu() else contextlib.nullcontext():
        for policy in ("full", "flexi"):
            engine, cache = _engine(part, sizes, lm, policy=policy, budget_pages=roomy)
            requests = _requests(sizes, sizes.prompts, STEPS)
            done = run_requests(
                lm, engine.program, requests, None, cache, None, progress=part.progress
            )
            made[policy] = [generation.token_ids for generation in done]
    for at, (full, flexi) in enumerate(zip(*made.values(), strict=True)):
        same = np.equal(full, flexi)
        what = f"prompt of {sizes.prompts[at]} tokens: {STEPS} tokens of flexi are those of full"
        part.check(what, len(same) == STEPS and bool(same.all()), f"{same.sum()} are")
    distinct = len({token for full in made["full"] for token in full})
    part.check("they are no single token", distinct > len(sizes.prompts), f"{distinct} distinct")


def tiers(part: Part, sizes: Sizes) -> None:
    """With a small budget each resident page is its host copy, after each of five reranks.

    The host's pages of the prompt stay as they were, and pages did move.
    """
    lm = random_model(sizes.small, name="small", dtype=sizes.dtype)
    engine, cache = _engine(part, sizes, lm, policy="flexi", budget_pages=sizes.small_budget_pages)
    new_tokens = (RERANKS + 1) * cache.chunk_steps
    for request in _requests(sizes, sizes.long_prompts, new_tokens):
        if engine.can_admit(request):
            engine.admit(request, f"prompt {request.index + 1}")
    assert engine.cache is not None
    before, layout = _host_pages(engine), engine.program.layout
    for rerank in range(1, RERANKS + 1):
        engine.step()
        compared, unequal = compared_pages(layout, engine.cache)
        found = f"{unequal} of {compared} pages differ"
        part.check(f"tiers after rerank {rerank}", compared > 0 and not unequal, found)
        part.progress("reranks", rerank, RERANKS)
    moved = [engine.stats(sequence) for sequence in engine.running.values()]
    promoted = sum(stats.promoted_pages for stats in moved)
    part.check("pages were promoted", promoted > 0, promoted)
    stored = sum(stats.offloaded_pages for stats in moved)
    part.check("pages were offloaded", stored > 0, stored)
    part.check("the host still has the prompts", _still_there(before, _host_pages(engine)))


def _engine(
    part: Part, sizes: Sizes, lm: LanguageModel, *, policy: str, budget_pages: int
) -> tuple[ModelRunner, CacheConfig]:
    """For the prompts of both parts: where they have one budget, they have the same programs."""
    budget = budget_pages * sizes.page
    cache = cache_for(sizes.small, "small", policy=policy, budget_tokens=budget)
    new_tokens = max(STEPS, (RERANKS + 1) * cache.chunk_steps)
    prompts = (*sizes.prompts, *sizes.long_prompts)
    program = make_program(
        lm,
        cache,
        max_tokens=max(prompts) + new_tokens,
        max_new_tokens=new_tokens,
        batch=max(len(sizes.prompts), len(sizes.long_prompts)),
    )
    return ModelRunner(lm, program, progress=part.progress), cache


def _requests(sizes: Sizes, prompts: tuple[int, ...], new_tokens: int) -> list[Request]:
    return [
        greedy_request(index, random_tokens(sizes.small, length, index), new_tokens)
        for index, length in enumerate(prompts)
    ]


def _host_pages(engine: ModelRunner) -> list[np.ndarray]:
    """Bits of the full pages of all prompts on the host, of every layer and head."""
    assert engine.cache is not None
    found, page_size = [], engine.program.layout.sizes.page_size
    blocks = [
        block
        for sequence in engine.running.values()
        for block in sequence.blocks[: len(sequence.request.tokens) // page_size]
    ]
    for layer in engine.cache.pools:
        for host in layer.host:
            if isinstance(host, HostPages):
                found += [np.asarray(pool)[blocks].view(np.uint16) for pool in (host.k, host.v)]
    return found


def _still_there(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return len(before) > 0 and all(map(np.array_equal, before, after))
