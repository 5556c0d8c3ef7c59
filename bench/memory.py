"""Device memory against the length of a request: `python -m bench.memory`.

For each policy and length, in a process of its own

    closed form   of keys and values: K tokens of a stable head, all S of an unstable one;
    cache         what a request takes by `flexijax.cache.memory`, summaries counted;
    compiled      arrays that decode steps are given beside the weights, and what they work with, by
                  the compiler's count for the very programs that run;
    measured      how much more the process holds at its peak while it reads a prompt of that length
                  and decodes: by the allocator of a GPU, else by what is resident.

A number is shown only if the bytes of the cache's arrays are those that were predicted.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import results
from bench.sides import Bench, Cell, tiny_model
from bench.timing import table

POLICIES = ("full", "quest", "flexi")
COLUMNS = (
    *("system", "context", "closed_mb", "cache_mb", "arrays_mb", "temporary_mb", "peak_mb"),
    *("host_mb", "to_full"),
)


def rows_of(bench: Bench, policies: Sequence[str], contexts: Sequence[int]) -> list[dict]:
    """A row for each policy and length; to_full: of the cache's bytes."""
    rows = []
    for context in contexts:
        for policy in policies:
            print(f"{policy} at {context} tokens", file=sys.stderr, flush=True)
            found = bench.memory(Cell(policy, context, 1))
            mb = {f"{name}_mb": found[f"{name}_bytes"] / 1e6 for name in _BYTES}
            share = found["cache_bytes"] / found["full_bytes"]
            rows.append({"system": policy, "context": context, **found, **mb, "to_full": share})
    return rows


_BYTES = ("closed", "cache", "arrays", "temporary", "peak", "host")


def wrong(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is not as predicted: arrays that are allocated, or a closed form that is far off."""
    found = []
    for row in rows:
        where = f"{row['system']} at {row['context']} tokens"
        if row["allocated_bytes"] != row["predicted_bytes"]:
            found.append(f"{where}: {row['allocated_bytes']} bytes, not {row['predicted_bytes']}")
        # Beside keys and values there are summaries, a tenth of them at most.
        if not 0.99 <= row["cache_bytes"] / row["closed_bytes"] <= 1.5:
            found.append(f"{where}: {row['cache_bytes']} bytes, closed form {row['closed_bytes']}")
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bytes against length: lines for the closed form, marks for what was counted and measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    marks = {"cache_mb": ("o", "cache"), "arrays_mb": ("x", "compiled"), "peak_mb": ("^", "peak")}
    for at, policy in enumerate(dict.fromkeys(row["system"] for row in rows)):
        mine = [row for row in rows if row["system"] == policy]
        x, color = [row["context"] for row in mine], f"C{at}"
        axes.plot(x, [row["closed_mb"] for row in mine], color=color, label=f"{policy}, closed")
        for name, (mark, what) in marks.items():
            y = [row[name] for row in mine]
            axes.plot(x, y, mark, color=color, fillstyle="none", label=f"{policy}, {what}")
    axes.set(xlabel="tokens of a request", ylabel="MB on the device", ylim=(0, None))
    axes.set_title("Device memory beside the weights", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if args.work is None else args.work
        folder.mkdir(exist_ok=True)
        if args.quick:
            quick = tiny_model(Path(name))
            vars(args).update(quick, contexts=[300])
        vars(args).update(lock=None, fed=0)
        bench = Bench.of(args, folder)
        # What is read does not change what it takes.
        draws = np.random.default_rng(0)
        bench.token_ids = draws.integers(0, 97, max(args.contexts)).tolist()
        rows = rows_of(bench, args.policies, args.contexts)
    not_so = wrong(rows)
    if not_so:
        print("bytes are not as predicted, so none are shown:", *not_so, sep="\n", file=sys.stderr)
        return 1
    results.write(args.json, "memory", args, rows=rows)
    if args.plot is not None:
        draw(rows, args.plot)
    print(table(rows, COLUMNS))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png or .svg")
    parser.add_argument("--quick", action="store_true", help="a tiny model, in this process")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8000])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2", help="or a folder of Hugging Face")
    parser.add_argument("--profile", default="smollm2-135m", help="name or file")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keeps what is measured: a run goes on from it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
