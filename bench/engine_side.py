"""One measurement of an engine under load, in a process of its own.

`python -m bench.engine_side SPEC` with the JSON of `measure`'s arguments prints the JSON of its
result as the last line.
"""

import dataclasses
import sys
import time
from typing import Any

from bench.timing import answer_prompts, peak_bytes


def measure(
    *,
    prompts: list[list[int]],
    new_tokens: int,
    policy: str,
    budget_tokens: int,
    device_bytes: int | str,
    max_requests: int,
    max_context: int,
    usual_context: int,
    prefill_first: bool,
) -> dict[str, Any]:
    """All prompts submitted at once, to their end; compiling is outside of the clock.

    new_tokens: of each, its model's stop tokens ignored. Returns `EngineTotals`, the seconds of all
    of it, and of what lies between two times that a request's tokens came the longest.
    """
    import flexijax
    from flexijax.cli.terminal import return_freed_memory, use_compilation_cache

    return_freed_memory()
    use_compilation_cache()
    engine = flexijax.Engine(
        flexijax.load("smollm2"),
        cache=flexijax.CacheConfig(policy=policy, budget_tokens=budget_tokens),
        max_requests=max_requests,
        max_context=max_context,
        usual_context=usual_context,
        device_bytes=device_bytes,
        prefill_first=prefill_first,
    )
    sampling = flexijax.Sampling(ignore_eos=True)
    engine.compile(sampling)
    started, compiled = time.perf_counter(), engine.compile_s
    streams = [
        engine.submit(prompt, max_new_tokens=new_tokens, sampling=sampling) for prompt in prompts
    ]
    while engine.step():
        print(f"{engine.totals.ended} of {len(prompts)} ended", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started - (engine.compile_s - compiled)
    totals = dataclasses.asdict(engine.totals)
    made = [stream.result() for stream in streams]
    return {
        "totals": totals,
        "seconds": seconds,
        "running": engine.totals.mean_running,
        "decode_tokens_per_s": totals["new_tokens"] / totals["decode_s"],
        "tokens_per_s": (totals["new_tokens"] + totals["prompt_tokens"]) / seconds,
        "new_tokens_per_s": totals["new_tokens"] / seconds,
        "ttft_s": [one.metrics.ttft_s for one in made],
        "longest_gap_s": max(one.metrics.longest_gap_s for one in made),
        "pauses": totals["paused"],
        "compiled_late_s": engine.compile_s - compiled,
        "rows": engine.max_requests,
        "blocks": engine.num_blocks,
        "peak_bytes": peak_bytes(),
        "tokens": [list(one.token_ids) for one in made],
    }


if __name__ == "__main__":
    answer_prompts(measure)
