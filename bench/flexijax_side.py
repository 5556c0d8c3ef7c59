"""One measurement of our own generation, in a process of its own.

`python -m bench.flexijax_side SPEC` with the JSON of `measure`'s arguments prints the JSON of its
result as the last line.
"""

import json
import sys
from typing import Any

from bench.timing import median, peak_bytes


def measure(
    *, prompts: list[list[int]], steps: int, mode: str, budget_tokens: int
) -> dict[str, Any]:
    """Prefill seconds, ms of a decode step, KV bytes, peak memory and the tokens.

    prompts: B lists of token ids, all of one length. steps: decode steps after the prefill's own
    token. Compiling is outside of the clock; peak memory counts it, and the loading too.
    """
    from flexijax.config import CacheConfig
    from flexijax.generate import generate
    from flexijax.models.load import load
    from flexijax.sampling import Sampling
    from flexijax.terminal import return_freed_memory, use_compilation_cache

    # As the command line does.
    return_freed_memory()
    use_compilation_cache()
    made = generate(
        load("smollm2"),
        prompts,
        max_new_tokens=steps + 1,
        cache=CacheConfig(mode=mode, budget_tokens=budget_tokens),
        sampling=Sampling(ignore_eos=True),
    )
    metrics = [one.metrics for one in made]
    return {
        # Prompts are read one after the other, and decoded together.
        "prefill_s": sum(one.prefill_s for one in metrics),
        "decode_ms": median(one.tpot_ms for one in metrics),
        "device_kv_bytes": sum(one.device_kv_bytes for one in metrics),
        "peak_bytes": peak_bytes(),
        "tokens": [one.token_ids for one in made],
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    with open(spec.pop("prompts_file"), encoding="utf-8") as file:
        prompts = json.load(file)
    print(json.dumps(measure(prompts=prompts, **spec)))


if __name__ == "__main__":
    main()
