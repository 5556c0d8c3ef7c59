"""First contact with an NVIDIA GPU, in ten minutes: `python -m bench.gpu --json FILE`.

Kernels against their oracles at production shapes, pages between the tiers bit for bit, the tokens
of a small model, and Llama-3.1-8B with 16 requests of 32 thousand tokens by wall clock. Weights are
random and nothing is downloaded. A speed is shown only where all checks of its part held. Where
there is no GPU everything is tiny, and shows no more than that the code runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.apart import run_apart
from bench.gpu.parts import EXTRA, MEMCHECK, PARTS
from bench.gpu.report import FAILED, add_shares, broke, machine, run_part, summary
from bench.gpu.sizes import FULL, QUICK
from flexijax.cli.terminal import Progress
from flexijax.engine.jit_cache import forget_compiled
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.host_memory import available_host_bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Ends with 1 where a part failed."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(given)
    if args.memcheck and MEMCHECK not in args.parts:
        args.parts = [*args.parts, MEMCHECK]
    pin_more(os.environ)
    if args.lines is not None:
        return _child(args)
    about: dict[str, Any] = {"command": shlex.join(["python", "-m", "bench.gpu", *given])}

    def write(records: list[dict[str, Any]]) -> None:
        """The JSON as far as it has come, so that an interrupted run is not lost."""
        for record in records:
            about.update(record.pop("about", {}))
        add_shares(records)
        if args.json is not None:
            content = {"parts": records, **about}
            args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    records: list[dict[str, Any]] = []
    if args.one_process:
        for record in run_here(args.parts, quick=args.quick):
            records.append(record)
            write(records)
    else:
        with tempfile.TemporaryDirectory() as folder:
            records = run_apart(
                args.parts,
                lambda names, lines: child_command(names, lines, quick=args.quick),
                lines=Path(folder) / "records",
                seconds=args.part_seconds,
                write=write,
            )
    print(summary(records))
    if about.get("quick"):
        print("\nEverything was tiny: these times say nothing of a GPU.")
    return int(any(record["status"] == FAILED for record in records))


def run_here(names: Sequence[str], *, quick: bool) -> Iterator[dict[str, Any]]:
    """The record of each part, with what is known of machine and sizes."""
    tiny = quick or not platform.is_gpu()
    sizes = QUICK if tiny else FULL
    if platform.is_gpu():
        # The kernels of production; a CPU compiles and checks float32 faster.
        sizes = dataclasses.replace(sizes, dtype=FULL.dtype)
    about = {"environment": machine(), "quick": tiny, "settings": dataclasses.asdict(sizes)}
    progress = Progress()
    for name in names:
        function = {**PARTS, **EXTRA}[name]
        part = run_part(name, lambda part, run=function: run(part, sizes), progress)
        progress.close()
        print(f"{name}: {part.status} after {part.seconds:.1f} s", file=sys.stderr, flush=True)
        if not tiny:
            # What a part held is not to be missing to the next.
            forget_compiled()
            gc.collect()
        yield part.record() | {"about": about}


def child_command(names: Sequence[str], lines: Path, *, quick: bool) -> list[str]:
    """What runs parts of these names and appends their records to a file; see `run_apart`."""
    size = ["--quick"] if quick else []
    options = [*size, "--lines", str(lines), "--parts", *names]
    return [sys.executable, "-m", "bench.gpu", *options]


def _child(args: argparse.Namespace) -> int:
    for record in run_here(args.parts, quick=args.quick):
        with args.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if broke(record):
            return 1
    return 0


def pin_more(environ: MutableMapping[str, str]) -> None:
    """Lets XLA pin as much of the host's memory as is there, unless a limit is named already.

    Its own limit is little more than the host tier of the largest run, and its pool doubles when it
    grows. Read when jax first looks for a GPU.
    """
    gigabytes = int(0.8 * available_host_bytes()) >> 30
    if gigabytes > 64:
        environ.setdefault(platform.PINNED_LIMIT, str(gigabytes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was found")
    parser.add_argument("--quick", action="store_true", help="tiny, as where there is no GPU")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, *EXTRA], default=list(PARTS))
    parser.add_argument(
        "--memcheck", action="store_true", help="also a tiny run under compute-sanitizer"
    )
    parser.add_argument(
        "--part-seconds", type=float, default=400, metavar="S", help="that a part may take"
    )
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="all parts in this process, which one of them may take down",
    )
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
