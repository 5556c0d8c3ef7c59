"""One measurement of our own generation, in a process of its own.

`python -m bench.flexijax_side SPEC` with the JSON of `measure`'s arguments prints the JSON of its
result as the last line.
"""

import time
from typing import Any

from bench.timing import answer_prompts, median, peak_bytes


def measure(
    *, prompts: list[list[int]], steps: int, policy: str, budget_tokens: int
) -> dict[str, Any]:
    """Prefill seconds, ms of a decode step, KV bytes, peak memory and the tokens.

    prompts: B lists of token ids, all of one length. steps: decode steps after the prefill's own
    token, whole chunks of 16. A step's time is the median over chunks, their rerank included.
    Compiling is outside of the clock; peak memory counts it, and the loading too.
    """
    from flexijax.cache.memory import request_bytes
    from flexijax.cli.terminal import return_freed_memory, use_compilation_cache
    from flexijax.config import CacheConfig
    from flexijax.engine.model_runner import ModelRunner
    from flexijax.engine.plan import make_program
    from flexijax.engine.requests import make_requests
    from flexijax.engine.sampling import Sampling
    from flexijax.models.load import load

    # As the command line does.
    return_freed_memory()
    use_compilation_cache()
    lm, cache = load("smollm2"), CacheConfig(policy=policy, budget_tokens=budget_tokens)
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
    ModelRunner(lm, program, progress=None).admit(first[0], "")
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
        "device_kv_bytes": len(prompts) * request_bytes(program.layout, length).device,
        "peak_bytes": peak_bytes(),
        "tokens": [one.tokens for one in running],
    }


if __name__ == "__main__":
    answer_prompts(measure)
