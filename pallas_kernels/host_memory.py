"""How much memory this process can still take on the host, whoever limits it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # not a Unix: no such limits
    resource = None

# Where a process's limits lie under the mount of cgroups, by the controller named in
# /proc/self/cgroup ("" is version 2), with the names of limit and usage and, of the lines of
# memory.stat, those whose pages the kernel gives up when memory is short.
_CGROUPS = {
    "": ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def available_host_bytes(*, root: Path = Path("/")) -> int:
    """Bytes of host memory that this process can still take; 0 where it is over a limit.

    The least of: what the system calls available (/proc/meminfo), what is left under the limits of
    the control groups that the process is in (versions 1 and 2, their parents included; file pages
    do not count as used), and what is left of RLIMIT_AS and RLIMIT_DATA. root: of the file system,
    for tests.
    """
    found = [_system_bytes(root), *_cgroup_bytes(root), *_rlimit_bytes(root)]
    return max(0, min(found))


def _system_bytes(root: Path) -> int:
    available = _table(root / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        return available * 1024
    try:  # not Linux: what the C library calls free is the next best
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize


def _cgroup_bytes(root: Path) -> Iterator[int]:
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in _CGROUPS:
                continue
            folder, limit_name, usage_name, reclaimable = _CGROUPS[controller]
            mount = root / "sys/fs/cgroup" / folder
            # In a container the group may be named as the host sees it, while its own folder is
            # what is mounted: the names that are not there are passed over, the mount is not.
            parts = [part for part in group.split("/") if part not in ("", "..")]
            for depth in range(len(parts) + 1):
                place = mount.joinpath(*parts[:depth])
                limit, usage = _number(place / limit_name), _number(place / usage_name)
                if limit is not None and usage is not None:
                    stat = _table(place / "memory.stat")
                    yield limit - usage + sum(stat.get(name, 0) for name in reclaimable)


def _rlimit_bytes(root: Path) -> Iterator[int]:
    if resource is None:
        return
    status = _table(root / "proc/self/status")
    for limit, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        soft = resource.getrlimit(limit)[0]
        if soft != resource.RLIM_INFINITY and used in status:
            yield soft - status[used] * 1024


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", which is no limit, and where there is no file."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file, by name."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
