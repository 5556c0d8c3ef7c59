"""One measurement of our own generation, in a process of its own.

`python -m bench.flexijax_side SPEC` with the JSON of `measure`'s arguments prints the JSON of its
result as the last line.
"""

import json
import sys
import time
from typing import Any

from bench.timing import median, peak_bytes


def measure(
    *, prompts: list[list[int]], steps: int, mode: str, budget_tokens: int
) -> dict[str, Any]:
    """Prefill seconds, ms of a decode step, KV bytes, peak memory and the tokens.

    prompts: B lists of token ids, all of one length. steps: decode steps after the prefill's own
    token, whole chunks of 16. A step's time is the median over chunks, their rerank included.
    Compiling is outside of the clock; peak memory counts it, and the loading too.
    """
    from flexijax.cache.memory import request_bytes
    from flexijax.cli.terminal import return_freed_memory, use_compilation_cache
    from flexijax.config import CacheConfig
    from flexijax.engine.engine import Engine
    from flexijax.engine.requests import make_requests
    from flexijax.engine.sampling import Sampling
    from flexijax.generate import make_program
    from flexijax.models.load import load
    from flexijax.profiles import lookup

    # As the command line does.
    return_freed_memory()
    use_compilation_cache()
    lm, cache = load("smollm2"), CacheConfig(mode=mode, budget_tokens=budget_tokens)
    program = make_program(
        lm,
        cache,
        profile=lookup.find(lm, cache.budget_pages) if mode == "flexi" else None,
        max_tokens=len(prompts[0]) + steps + 1,
        rows=len(prompts),
    )
    if steps % program.rerank_interval:
        raise ValueError(f"steps={steps} must be whole chunks of {program.rerank_interval}")
    # As on the other side, the first run of a prefill is outside of the clock; that of a decode
    # chunk is outside of the median.
    first = make_requests(lm, [prompts[0][:64]], 1, Sampling(ignore_eos=True), 0)
    Engine(lm, program, progress=None).admit(first[0], "")
    engine = Engine(lm, program, progress=None)
    requests = make_requests(lm, prompts, steps + 1, Sampling(ignore_eos=True), 0)
    running = [engine.admit(request, "") for request in requests]
    chunk_ms = []
    while any(one.active for one in running):
        compiled, started = engine.compiler.seconds, time.perf_counter()
        engine.step()
        took = time.perf_counter() - started - (engine.compiler.seconds - compiled)
        chunk_ms.append(1e3 * took / program.rerank_interval)
    length = len(prompts[0]) + steps
    return {
        # Prompts are read one after the other, and decoded together.
        "prefill_s": sum(one.prefill_s for one in running),
        "decode_ms": median(chunk_ms),
        "device_kv_bytes": len(prompts) * request_bytes(program.layout, program.policy, length)[0],
        "peak_bytes": peak_bytes(),
        "tokens": [one.tokens for one in running],
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    with open(spec.pop("prompts_file"), encoding="utf-8") as file:
        prompts = json.load(file)
    print(json.dumps(measure(prompts=prompts, **spec)))


if __name__ == "__main__":
    main()
