"""One measurement of our own generation, in a process of its own.

`python -m bench.flexijax_side SPEC` with the JSON of the arguments of `measure`, `feed` or `pages`
prints the JSON of its result as the last line.
"""

import dataclasses
from typing import Any

import numpy as np

from bench.timing import answer_prompts, median, peak_bytes


def measure(
    *, prompts: list[list[int]], steps: int, model: str, policy: str, **options: Any
) -> dict[str, Any]:
    """Prefill seconds, ms of a decode step, KV bytes, peak memory and the tokens.

    prompts: B lists of token ids, all of one length. steps: decode steps after the prefill's own
    token, whole chunks of 16. A step's time is the median over chunks, their rerank included.
    Compiling is outside of the clock; peak memory counts it, and the loading too. options: of
    `CacheConfig`.
    """
    import time

    from flexijax.cache.memory import request_bytes
    from flexijax.config import CacheConfig
    from flexijax.engine.model_runner import ModelRunner
    from flexijax.engine.plan import make_program
    from flexijax.engine.requests import make_requests
    from flexijax.engine.sampling import Sampling

    lm, cache = _load(model), CacheConfig(policy=policy, **options)
    program = make_program(
        lm,
        cache,
        max_tokens=len(prompts[0]) + steps + 1,
        max_new_tokens=steps + 1,
        batch=len(prompts),
    )
    if steps % program.chunk_steps:
        raise ValueError(f"steps={steps} must be whole chunks of {program.chunk_steps}")
    # As on the other side, the first run of a prefill is outside of the clock; that of a decode
    # chunk is outside of the median. A prompt of this length is read in chunks of both sizes.
    first = make_requests(lm, [prompts[0][:600]], 1, Sampling(ignore_eos=True))
    warm = ModelRunner(lm, program, progress=None)
    warm.admit(first[0], "")
    engine = ModelRunner(lm, program, progress=None)
    requests = make_requests(lm, prompts, steps + 1, Sampling(ignore_eos=True))
    running = [engine.admit(request, "") for request in requests]
    chunk_ms = []
    while any(one.active for one in running):
        compiled, started = engine.runner.seconds, time.perf_counter()
        engine.step()
        took = time.perf_counter() - started - (engine.runner.seconds - compiled)
        chunk_ms.append(1e3 * took / program.chunk_steps)
    length = len(prompts[0]) + steps
    return {
        # Prompts are read one after the other, and decoded together.
        "prefill_s": sum(one.prefill_s for one in running),
        "decode_ms": median(chunk_ms),
        "compile_s": warm.runner.seconds + engine.runner.seconds,
        "device_kv_bytes": len(prompts) * request_bytes(program.layout, length).device,
        "peak_bytes": peak_bytes(),
        "tokens": [one.tokens for one in running],
    }


def feed(
    *,
    prompts: list[list[int]],
    tokens: list[int],
    logits: str,
    model: str,
    policy: str,
    **options: Any,
) -> dict[str, Any]:
    """Feeds a prompt and then the tokens, whole chunks; logits before each to a .npy, [T, V]."""
    from flexijax.config import CacheConfig
    from flexijax.engine.continuation import Continuation, read
    from flexijax.engine.plan import make_program

    lm, [prompt] = _load(model), prompts
    cache = CacheConfig(policy=policy, **options)
    program = make_program(
        lm, cache, max_tokens=len(prompt) + len(tokens), max_new_tokens=len(tokens)
    )
    fed = Continuation(lm, program, read(lm, [program], prompt))
    found = np.concatenate([fed.first_logits[None], fed.feed(tokens)[:-1]])
    np.save(logits, found)
    return {"logits": logits}


def pages(
    *,
    prompts: list[list[int]],
    steps: int,
    model: str,
    unread: int,
    at_most: int,
    tie: float,
    close: float,
    **options: Any,
) -> dict[str, Any]:
    """`same_pages.agree` with FlexiCache in PyTorch, in this process too. options: as `measure`."""
    from bench import torch_side
    from bench.pytorch_flexicache import FlexiCache
    from bench.pytorch_groups import Settings
    from bench.same_pages import agree
    from flexijax.config import CacheConfig
    from flexijax.engine.plan import find_profile
    from flexijax.engine.program import Program

    lm, [prompt], cache = _load(model), prompts, CacheConfig(**options)
    profile = find_profile(lm, cache)
    unstable = tuple(map(profile.unstable_heads, range(profile.num_layers)))
    settings = Settings(unstable, budget_tokens=cache.budget_tokens)
    theirs = torch_side.load(model)

    def make(program: Program) -> FlexiCache:
        return FlexiCache(theirs, settings, room=program.layout.sizes.max_tokens)

    limits = {"unread": unread, "at_most": at_most, "tie": tie, "close": close}
    found = agree(lm, prompt, cache, make, steps=steps, **limits)
    return dataclasses.asdict(found) | {"wrong": found.wrong()}


def _load(model: str) -> Any:
    from flexijax.cli.terminal import return_freed_memory, use_compilation_cache
    from flexijax.models.load import load

    # As the command line does.
    return_freed_memory()
    use_compilation_cache()
    return load(model)


CALLS = (measure, feed, pages)

if __name__ == "__main__":
    answer_prompts(*CALLS)
