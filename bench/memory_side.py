"""What one request takes of memory, in a process of its own: see `bench.memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from bench.timing import answer_prompts


def memory(
    *, prompts: list[list[int]], steps: int, model: str, policy: str, **options: Any
) -> dict[str, Any]:
    """Bytes of a request that is read, all but its last `steps` tokens, and then decoded.

    options: of `CacheConfig`.
    """
    from flexijax.cache.cache import init
    from flexijax.cache.memory import cache_bytes, nbytes, request_bytes, trim_heap
    from flexijax.cli.terminal import return_freed_memory
    from flexijax.config import CacheConfig
    from flexijax.engine.inventory import decode_calls
    from flexijax.engine.model_runner import ModelRunner
    from flexijax.engine.plan import make_program
    from flexijax.engine.program import Runner
    from flexijax.engine.requests import make_requests
    from flexijax.engine.sampling import Sampling
    from flexijax.models.load import load

    return_freed_memory()
    # Programs that come from a folder know nothing of their memory.
    jax.config.update("jax_enable_compilation_cache", False)
    lm, [prompt], cache = load(model), prompts, CacheConfig(policy=policy, **options)
    prompt, length = prompt[: len(prompt) - steps], len(prompt)
    program = make_program(lm, cache, max_tokens=length, max_new_tokens=steps)
    runner, weights, compiled = Runner(None), nbytes(lm.params), []
    for call in decode_calls(program, lm.params):
        made = runner.compile(call.stage, call.function, call.static, call.args, call.donate)
        if call.stage == "decode" and (analysis := made.memory_analysis()) is not None:
            compiled.append(analysis)
    device, host = cache_bytes(program.layout, program.policy)
    allocated = nbytes(init(program.layout, program.policy))
    trim_heap()
    before = _reset_peak()
    engine = ModelRunner(lm, program, progress=None)
    requests = make_requests(lm, [prompt], steps, Sampling(ignore_eos=True))
    sequence = engine.admit(requests[0], "")
    while sequence.active:
        engine.step()
    taken = request_bytes(program.layout, length)
    return {
        "closed_bytes": closed_form(program.layout, length),
        "cache_bytes": taken.device,
        "full_bytes": taken.full,
        "host_bytes": taken.host,
        "arrays_bytes": max(x.argument_size_in_bytes for x in compiled) - weights,
        "temporary_bytes": max(x.temp_size_in_bytes for x in compiled),
        "peak_bytes": _peak() - before,
        "allocated_bytes": allocated,
        "predicted_bytes": device + host,
    }


def closed_form(layout: Any, length: int) -> int:
    """Keys and values of S tokens: all in heads that keep them, K and a rerank interval in others.

    S tokens take 2 S H channels of each KV head; of heads with limited room at most K + R of them.
    """
    sizes, found = layout.sizes, 0
    for *_, group in layout.all_groups():
        held = length
        if group.room is not None:
            held = min(length, group.room * sizes.page_size + sizes.chunk_steps)
        found += len(group.heads) * held * sizes.page_bytes // sizes.page_size
    return found


def _reset_peak() -> int:
    """Bytes held now, from which on the peak is counted."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_in_use"]
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    """The most bytes held since then; of a GPU's allocator since its start."""
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats is not None else _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


CALLS = (memory,)

if __name__ == "__main__":
    answer_prompts(*CALLS)
