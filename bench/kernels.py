"""Every kernel: right, then how near to the speed of a copy: `python -m bench.kernels`.

The cases of `bench.gpu`, in this process and on whatever device there is: each kernel against its
oracle in float64, at odd lengths and at the longest, and only then its time, the bytes that it must
read or write a second, and the share of what a copy of this machine reaches. On a CPU what runs is
XLA's implementation of each, at sizes of SmolLM2 with 4 requests of 8 thousand tokens.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.gpu.kernels import READING
from bench.gpu.parts import PARTS
from bench.gpu.report import BANDWIDTH, FAILED, add_shares, machine, run_part
from bench.gpu.sizes import FULL, QUICK, Sizes
from bench.timing import table
from flexijax.cli.terminal import Progress
from flexijax.pallas_kernels import platform

KERNELS = (*READING, "page_moves")
COLUMNS = ("kernel", "checks", "ms", "gb_per_s", "share", "of")
# Heads of all of SmolLM2's layers would be more than a second of oracles: those of ten layers.
CPU = dataclasses.replace(
    FULL,
    batch=4,
    pages=512,
    heads=30,
    group=3,
    width=64,
    dtype="float32",
    chunk=256,
    copy_bytes=1 << 28,
    calls=5,
    rounds=5,
    sets=2,
)


def rows_of(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each speed, or for a part without any, what came of it instead."""
    rows = []
    for record in records:
        held = f"{sum(one['passed'] for one in record['checks'])}/{len(record['checks'])}"
        for speed in record["speeds"] or [{"what": record["name"], "of": record["status"]}]:
            rows.append({"kernel": speed["what"], "checks": held, **speed})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    sizes: Sizes = FULL if platform.is_gpu() else CPU
    if args.quick:
        sizes = QUICK
    records, progress = [], Progress()
    for name in (BANDWIDTH, *args.kernels):
        function = PARTS[name]
        part = run_part(name, lambda part, run=function: run(part, sizes), progress)
        progress.close()
        print(f"{name}: {part.status} after {part.seconds:.1f} s", file=sys.stderr, flush=True)
        records.append(part.record())
        if not args.quick:
            add_shares(records)
        found = {"rows": rows_of(records), "parts": records}
        sized = vars(args) | {"sizes": dataclasses.asdict(sizes)}
        results.write(args.json, "kernels", sized, device=machine()["device"], **found)
    rows = rows_of(records)
    if args.quick:
        rows = [{name: row[name] for name in ("kernel", "checks")} for row in rows]
    print(table(rows, COLUMNS[: 2 if args.quick else None]))
    for record in records:
        if record["why"]:
            print(f"{record['name']}: {record['why'].strip()}", file=sys.stderr)
    return int(any(record["status"] == FAILED for record in records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was found")
    parser.add_argument("--quick", action="store_true", help="tiny: checks, and no times")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    return parser


if __name__ == "__main__":
    sys.exit(main())
