"""All programs compiled before any of them runs, each while the next is traced."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flexijax.cache.memory import trim_heap
from flexijax.engine.inventory import ProgramCall
from flexijax.engine.program import Runner


def compile_all(runner: Runner, calls: Sequence[ProgramCall]) -> int:
    """Compiles what will be run; how many programs there were to compile.

    Tracing is Python's, and the compiler, or what reads its results from a disk, needs none of it.
    One program at a time: two take their memory at once and, on two cores, no less time.
    """
    before, started = runner.programs, time.perf_counter()
    stage, compiled = f"compiling {len(calls)} programs", 0
    waiting: Future[Any] | None = None
    with ThreadPoolExecutor(1, "flexijax-compiler") as compiler:
        for call in calls:
            if runner.progress is not None:
                runner.progress(stage, compiled, len(calls))
            lowered = runner.lower(call.function, call.static, call.args, donate=call.donate)
            if waiting is not None:
                waiting.result()
                compiled += 1
            waiting = compiler.submit(lowered.compile)
            del lowered
        if waiting is not None:
            waiting.result()
    trim_heap()
    if runner.progress is not None:
        runner.progress(stage, len(calls), len(calls))
    if runner.programs > before:
        runner.seconds += time.perf_counter() - started
    return runner.programs - before
