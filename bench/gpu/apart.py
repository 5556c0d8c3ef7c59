"""Parts in a process of their own, so that one that takes it down does not take the others along.

A compiler's failed assertion ends a process, and after an illegal access a GPU is of no more use to
it. So whatever breaks off ends the process, and the parts that are left get a new one.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.report import FAILED, Part, broke

_POLL_S = 0.2


def run_apart(
    names: Sequence[str],
    command: Callable[[Sequence[str], Path], Sequence[str]],
    *,
    lines: Path,
    seconds: float,
    write: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """The records of all parts.

    command: what runs parts of these names and appends each one's record to a file, a line each, in
    their order. lines: that file. seconds: that a part may take. write: called with what there is.
    """
    done: list[dict[str, Any]] = []
    while left := names[len(done) :]:
        lines.write_text("", encoding="utf-8")
        process = subprocess.Popen(command(left, lines))
        try:
            why = _watch(process, lines, done, seconds, write)
        finally:
            process.kill()
            process.wait()
        if why is not None and len(done) < len(names):
            part = Part(names[len(done)], status=FAILED, why=why)
            done.append(part.record())
            write(done)
    return done


def _watch(
    process: subprocess.Popen[bytes],
    lines: Path,
    done: list[dict[str, Any]],
    seconds: float,
    write: Callable[[list[dict[str, Any]]], None],
) -> str | None:
    """Adds records as they come; why the process ended in the middle of a part, if it did."""
    taken, since = 0, time.monotonic()
    while True:
        ended = process.poll()
        # Only whole lines: the last may still be on its way.
        whole = lines.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        for line in whole[taken:]:
            done.append(json.loads(line))
            since = time.monotonic()
            write(done)
        taken = len(whole)
        if ended is not None:
            fine = taken and (ended == 0 or broke(done[-1]))
            return None if fine else f"the process ended with {ended}"
        if time.monotonic() - since > seconds:
            return f"it took longer than {seconds:.0f} s"
        time.sleep(_POLL_S)
