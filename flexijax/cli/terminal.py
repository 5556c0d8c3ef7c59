"""What the subcommands share: progress on stderr, tables, errors of one line, JSON files."""

import contextlib
import ctypes
import dataclasses
import io
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm


def mend_streams() -> None:
    """Standard streams that can take every text: none that is closed, none that lacks characters.

    A terminal whose encoding lacks a character gets an escape for it, which is better than to lose
    the whole text after it was made. What was closed reads as empty and writes nowhere.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Progress:
    """A bar for the current stage on a terminal, a line a stage anywhere else.

    Called as `progress(stage, done, total)`; another stage takes the place of the one before. A
    stage that ends says how long it took, from its first call with done = 0 or, where there was
    none, from the end of the stage before. Silent while `quiet`.
    """

    def __init__(self, *, quiet: bool = False, out: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out = out or sys.stderr
        self._bar: tqdm | None = None
        self._stage: str | None = None
        self._since = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self.quiet:
            return
        if stage != self._stage:
            self.close()
            self._stage = stage
            if done == 0:
                self._since = time.perf_counter()
            if self._out.isatty():
                self._bar = tqdm(total=total, desc=stage, leave=False, file=self._out)
            elif done < total:
                print(f"{stage} ...", file=self._out, flush=True)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()
            now = time.perf_counter()
            print(f"{stage}: {now - self._since:.1f} s", file=self._out, flush=True)
            self._since = now

    def close(self) -> None:
        """Takes the bar away; what is printed next stands on a clean line."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, None


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text with aligned columns: the first to the left, the others to the right.

    In: [["", "flexi"], ["time", "8 ms"]]   Out: "      flexi\\ntime   8 ms"
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def megabytes(count: int) -> str:
    """12345678 -> "12.3 MB", in powers of ten."""
    return f"{count / 1e6:,.1f} MB"


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def check_writable(path: Path) -> None:
    """Raises OSError now for a file that could not be written at the end of a long run."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: no such folder, or no right to write")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes content as standard JSON: dataclasses as objects, NaN and infinities as null."""
    path.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")


def command_line(program: str) -> str:
    """How this process was started, with files named without their folders."""
    return shlex.join([*program.split(), *(one.rpartition("/")[2] for one in sys.argv[1:])])


def environment() -> dict[str, Any]:
    """The versions and the device that a result was made with."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
    }


def return_freed_memory() -> None:
    """Asks the C library to give large arrays back to the system as soon as they are freed.

    glibc otherwise keeps blocks of up to 32 MB for later, in a pool for each thread. What programs
    work with is kept, 32 MB at most: to get it anew for each chunk of a prompt would be a million
    page faults, a twelfth of the time of reading 6 thousand tokens. Anywhere else this does
    nothing.
    """
    m_arena_max, m_mmap_threshold, m_trim_threshold = -8, -3, -1  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(m_mmap_threshold, 1 << 24)
        mallopt(m_trim_threshold, 1 << 25)
        mallopt(m_arena_max, 1)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, so that only the first one waits for the compiler.

    In FLEXIJAX_CACHE_DIR, empty for off; else in the user's cache folder. A folder that jax was
    already told of by its own JAX_COMPILATION_CACHE_DIR stays.
    """
    folder = compiled_folder()
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_compilation_cache_max_size", 2 * 1024**3)


def compiled_folder() -> str:
    """Where `use_compilation_cache` keeps programs; empty for nowhere."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    ours = os.environ.get("FLEXIJAX_CACHE_DIR", str(Path(home) / "flexijax" / "compiled"))
    return os.environ.get("JAX_COMPILATION_CACHE_DIR", ours)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
