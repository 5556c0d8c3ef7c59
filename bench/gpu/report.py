"""What a part found: its checks, then speeds, which a failed check forbids; tables and JSON."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from bench import results
from bench.timing import table
from flexijax.engine.program import Progress
from flexijax.pallas_kernels import platform

PASSED, FAILED, SKIPPED = "passed", "FAILED", "skipped"
_COLUMNS = ("part", "what", "ms", "gb_per_s", "share", "of")
# The part that measures what speeds are compared with.
BANDWIDTH = "bandwidth"


class Skip(Exception):
    """Says why a part cannot run here, which is no failure."""


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""


@dataclasses.dataclass
class Part:
    """The record of one part.

    checks: what was asked and whether it held. speeds: numbers, each with the name of what was
    timed. why: of a part that was skipped or broke off.
    """

    name: str
    checks: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    speeds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    status: str = ""
    why: str = ""
    seconds: float = 0.0
    progress: Progress = _silent

    def check(self, what: str, passed: bool, found: object = "") -> bool:
        """Enters what was asked and whether it held; the part goes on either way."""
        self.checks.append({"what": what, "passed": bool(passed), "found": str(found)})
        return bool(passed)

    def near(self, what: str, error: float, most: float) -> bool:
        """Enters a check that an error is at most so much, and is a number."""
        return self.check(what, error <= most, f"{error:.2g}, at most {most:.2g}")

    def speed(self, what: str, **numbers: Any) -> None:
        """Enters numbers; nothing where a check before them failed or there was none."""
        if self.right:
            self.speeds.append({"what": what, **numbers})

    @property
    def right(self) -> bool:
        """Whether something was checked, and all of it held."""
        return bool(self.checks) and all(check["passed"] for check in self.checks)

    def record(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("name", "status", "checks", "speeds", "why", "seconds")
        return {name: getattr(self, name) for name in names}


def run_part(name: str, function: Callable[[Part], None], progress: Progress) -> Part:
    """Runs a part to its end, whatever it raises."""
    part, started = Part(name, progress=progress), time.perf_counter()
    try:
        function(part)
        part.status = PASSED if part.right else FAILED
    except Skip as reason:
        part.status, part.why = SKIPPED, str(reason)
    except Exception:
        # What a kernel, the compiler or the driver raises has no common type.
        part.status, part.why = FAILED, traceback.format_exc()[-4000:]
        part.speeds.clear()
    if part.status == FAILED:
        part.speeds.clear()
    part.seconds = time.perf_counter() - started
    return part


def broke(record: dict[str, Any]) -> bool:
    """Whether a part ended by an error, after which its process may be of no more use."""
    return record["status"] == FAILED and bool(record["why"])


def add_shares(records: Sequence[dict[str, Any]]) -> None:
    """Adds to each speed in GB/s its share of the measured copy that it names as `of`."""
    peaks = {
        speed["what"]: speed["gb_per_s"]
        for record in records
        if record["name"] == BANDWIDTH
        for speed in record["speeds"]
    }
    for record in records:
        for speed in record["speeds"]:
            if speed.get("of") in peaks:
                speed["share"] = speed["gb_per_s"] / peaks[speed["of"]]


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Two tables, parts and speeds, and below them what failed and why."""
    parts = [
        {
            "part": record["name"],
            "result": record["status"],
            "checks": f"{sum(c['passed'] for c in record['checks'])}/{len(record['checks'])}",
            "seconds": record["seconds"],
        }
        for record in records
    ]
    speeds = [{"part": record["name"], **speed} for record in records for speed in record["speeds"]]
    texts = [table(parts, ("part", "result", "checks", "seconds"))]
    if speeds:
        texts.append(table(speeds, _COLUMNS))
        texts.append("\n".join(filter(None, map(_beside, speeds))))
    texts += [text for record in records for text in _reasons(record)]
    return "\n\n".join(texts)


def _beside(speed: dict[str, Any]) -> str:
    """What the table has no column for."""
    rest = {name: value for name, value in speed.items() if name not in _COLUMNS}
    shown = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    return f"{speed['what']}: {', '.join(shown)}" if rest else ""


def _reasons(record: dict[str, Any]) -> Iterable[str]:
    wrong = [check for check in record["checks"] if not check["passed"]]
    for check in wrong:
        yield f"{record['name']}: not so: {check['what']}: {check['found']}"
    if record["why"]:
        yield f"{record['name']} {record['status']}: {record['why'].strip()}"


def machine() -> dict[str, Any]:
    """The machine, the device, versions and the commit behind a measurement."""
    device = jax.devices()[0]
    return results.machine() | {
        "device": {
            "kind": device.device_kind,
            "platform": device.platform,
            "version": getattr(device.client, "platform_version", ""),
            "free_bytes": platform.free_device_bytes(),
            "driver": results.said(
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            ),
        },
    }
