"""The JSON that a bench leaves: what was found, and what it was found with."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.timing import environment
from flexijax.cli.terminal import command_line, write_json

# Of a command line: where things lie on this machine, which no reader has.
_PLACES = ("json", "lock", "plot", "records", "work")


def write(
    path: Path | None, bench: str, args: argparse.Namespace | Mapping[str, Any], **found: Any
) -> None:
    """Writes what was found, the settings and the environment; nothing where path is None.

    bench: the module's name behind "bench.". args: of its command line, of which files keep their
    names and lose their folders. Written as often as there is more, an interrupted run is not lost.
    """
    if path is None:
        return
    settings = dict(args if isinstance(args, Mapping) else vars(args))
    content = {
        "bench": bench,
        "command": command(bench),
        **found,
        "settings": {name: _named(x) for name, x in settings.items() if name not in _PLACES},
        "environment": machine(threads=settings.get("threads")),
    }
    part = path.with_name(f"{path.name}.part")
    write_json(part, content)
    part.replace(path)


def command(bench: str) -> str:
    """How this process was started, with files named without their folders."""
    return command_line(f"python -m bench.{bench}")


def machine(*, threads: int | None = None) -> dict[str, Any]:
    """The machine, its memory, the versions, and the commit of this repository, as JSON values.

    threads: of every library's pool; None: as many as this process may run on.
    """
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    with contextlib.suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return environment(threads=threads) | {"memory_bytes": memory, "commit": commit()}
    return environment(threads=threads) | {"commit": commit()}


def commit() -> str | None:
    """The commit, with "-dirty" where files differ from it; None outside of a repository."""
    return said("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def said(*command: str) -> str | None:
    """What a command of the system says; None where there is none, or it fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=20
        )
        if not done.returncode:
            return done.stdout.strip()
    return None


def _named(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    if isinstance(value, Path):
        return value.name
    return value.rpartition("/")[2] if isinstance(value, str) and "/" in value else value
