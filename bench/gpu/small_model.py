"""A small random model through the whole product: its tokens, and what its tiers hold."""

from __future__ import annotations

import jax
import numpy as np

import flexijax
from bench.gpu.models import cache_for, greedy_request, random_model, random_tokens
from bench.gpu.report import Part
from bench.gpu.sizes import Sizes
from bench.gpu.tiers_equal import compared_pages
from flexijax.engine.engine import Engine
from flexijax.engine.plan import bucket, make_program

STEPS = 64
RERANKS = 5


def tokens(part: Part, sizes: Sizes) -> None:
    """With a budget for the whole context `flexi` and `quest` say what `full` says, token by token.

    In float32 at full precision: rounding to less would make other tokens the most likely ones.
    """
    config, prompts = sizes.small, _prompts(sizes)
    roomy = bucket(-(-(max(sizes.prompts) + STEPS) // sizes.page)) * sizes.page
    with jax.default_matmul_precision("highest"):
        lm = random_model(config, name="small", dtype="float32")
        made = {
            policy: flexijax.generate(
                lm,
                prompts,
                max_new_tokens=STEPS,
                cache=cache_for(config, "small", policy=policy, budget_tokens=roomy),
                sampling=flexijax.Sampling(ignore_eos=True),
                progress=part.progress,
            )
            for policy in ("full", "flexi")
        }
    for at, (full, flexi) in enumerate(zip(*made.values(), strict=True)):
        same = np.equal(full.token_ids, flexi.token_ids)
        what = f"prompt of {sizes.prompts[at]} tokens: {STEPS} tokens of flexi are those of full"
        part.check(what, len(same) == STEPS and bool(same.all()), f"{same.sum()} are")
    distinct = len({token for full in made["full"] for token in full.token_ids})
    part.check("they are no single token", distinct > len(prompts), f"{distinct} distinct ones")


def tiers(part: Part, sizes: Sizes) -> None:
    """With a small budget each resident page is its host copy, after each of five reranks.

    The host's pages of the prompt stay as they were, and pages did move.
    """
    config = sizes.small
    lm = random_model(config, name="small", dtype=sizes.dtype)
    cache = cache_for(
        config, "small", policy="flexi", budget_tokens=sizes.small_budget_pages * sizes.page
    )
    new_tokens = (RERANKS + 1) * cache.chunk_steps
    program = make_program(
        lm,
        cache,
        max_tokens=max(sizes.prompts) + new_tokens,
        max_new_tokens=new_tokens,
        batch=len(sizes.prompts),
    )
    engine = Engine(lm, program, progress=part.progress)
    for index, prompt in enumerate(_prompts(sizes)[: program.layout.sizes.batch]):
        engine.admit(greedy_request(index, prompt, new_tokens), f"prompt {index + 1}")
    assert engine.cache is not None
    before = _host_pages(engine)
    for rerank in range(1, RERANKS + 1):
        engine.step()
        compared, unequal = compared_pages(program.layout, engine.cache)
        found = f"{unequal} of {compared} pages differ"
        part.check(f"tiers after rerank {rerank}", compared > 0 and not unequal, found)
        part.progress("reranks", rerank, RERANKS)
    moved = [engine.stats(sequence) for sequence in engine.running.values()]
    promoted = sum(stats.promoted_pages for stats in moved)
    part.check("pages were promoted", promoted > 0, promoted)
    stored = sum(stats.offloaded_pages for stats in moved)
    part.check("pages were offloaded", stored > 0, stored)
    part.check("the host still has the prompts", _still_there(before, _host_pages(engine)))


def _prompts(sizes: Sizes) -> list[list[int]]:
    return [random_tokens(sizes.small, length, seed) for seed, length in enumerate(sizes.prompts)]


def _host_pages(engine: Engine) -> list[np.ndarray]:
    """Bits of the full pages of all prompts on the host, of every layer and head."""
    assert engine.cache is not None
    found, page_size = [], engine.program.layout.sizes.page_size
    blocks = [
        block
        for sequence in engine.running.values()
        for block in sequence.blocks[: len(sequence.request.tokens) // page_size]
    ]
    for layer in engine.cache.layers:
        for host in layer.host:
            if host is not None:
                found += [np.asarray(pool)[blocks].view(np.uint16) for pool in (host.k, host.v)]
    return found


def _still_there(before: list[np.ndarray], after: list[np.ndarray]) -> bool:
    return len(before) > 0 and all(map(np.array_equal, before, after))
