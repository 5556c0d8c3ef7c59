"""Decode and prefill of cache methods against transformers: `python -m bench.decode`.

Same machine, same weights (SmolLM2-135M, float32), same prompts, as many threads. Every
measurement is a fresh process, so that memory is honest; systems take turns, so that a slow minute
of the machine meets all of them. No number is shown unless the tokens were right first.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.timing import environment, in_fresh_process, interleaved, median, table
from flexijax import policies
from flexijax.demo import document
from flexijax.profiles.documents import read_documents

# transformers_static is transformers with its preallocated cache, which it has to be asked for.
SYSTEMS = ("flexi", "quest", "full", "transformers", "transformers_static")
CHOICES = tuple(dict.fromkeys((*SYSTEMS, *policies.names())))
COLUMNS = (
    *("system", "context", "batch", "prefill_s", "decode_ms"),
    *("peak_bytes", "device_kv_bytes", "rounds"),
)
GATE_CONTEXT, GATE_STEPS = 480, 32
_MEASURED = ("prefill_s", "decode_ms", "peak_bytes", "device_kv_bytes")
_MODULES = ("argparse", "subprocess", "socket", "typing", "unittest", "logging", "decimal")


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a system at a number of prompts of a number of tokens."""

    system: str
    context: int
    batch: int


@dataclass(frozen=True)
class Bench:
    """What all cells share."""

    folder: Path
    token_ids: list[int]
    steps: int
    budget_tokens: int
    threads: int
    lock: Path | None

    def run(self, cell: Cell, *, steps: int | None = None) -> dict[str, Any]:
        """Measures one cell in a process of its own."""
        name = f"{cell.context}x{cell.batch}.json"
        path = self.folder / name
        if not path.exists():
            # Every request begins somewhere else in the text.
            shift = max(1, (len(self.token_ids) - cell.context) // cell.batch)
            starts = [shift * row for row in range(cell.batch)]
            prompts = [self.token_ids[start : start + cell.context] for start in starts]
            path.write_text(json.dumps(prompts))
        spec: dict[str, Any] = {"prompts_file": str(path), "steps": steps or self.steps}
        if cell.system.startswith("transformers"):
            spec["threads"] = self.threads
            spec["cache"] = "static" if cell.system.endswith("static") else "dynamic"
            module = "bench.transformers_side"
        else:
            spec |= {"policy": cell.system, "budget_tokens": self.budget_tokens}
            module = "bench.flexijax_side"
        return in_fresh_process(module, spec, threads=self.threads, lock=self.lock)


def gate(bench: Bench, systems: Sequence[str]) -> list[str]:
    """What is wrong with the tokens, nothing if they are right.

    Within the budget every system attends to everything, so all must say what full says, and full
    what transformers says.
    """
    tokens = {}
    for system in systems:
        _say(f"checking the tokens of {system}")
        tokens[system] = bench.run(Cell(system, GATE_CONTEXT, 1), steps=GATE_STEPS)["tokens"]
    truth = "transformers" if "transformers" in tokens else next(iter(tokens))
    return [
        f"{system} says {found}, {truth} says {tokens[truth]}"
        for system, found in tokens.items()
        if found != tokens[truth]
    ]


def medians(runs: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a cell, with the median of every number over its rounds."""
    rows = []
    for cell, results in runs.items():
        measured = {name: median([one[name] for one in results]) for name in _MEASURED}
        measured |= {name: int(measured[name]) for name in ("peak_bytes", "device_kv_bytes")}
        rows.append(asdict(cell) | measured | {"rounds": len(results)})
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the numbers, with what came out; above 1 the first system is better.

    Only those of which both sides were measured.
    """
    by_cell = {(row["system"], row["context"], row["batch"]): row for row in rows}
    contexts = sorted({row["context"] for row in rows})
    found = []
    for name, other, quantity in (
        ("flexi", "transformers", "decode_ms"),
        ("flexi", "transformers_static", "decode_ms"),
        ("flexi", "full", "decode_ms"),
        ("full", "transformers", "decode_ms"),
        ("flexi", "transformers", "prefill_s"),
        ("flexi", "transformers", "peak_bytes"),
        ("flexi", "full", "device_kv_bytes"),
    ):
        for context in contexts:
            for batch in sorted({row["batch"] for row in rows}):
                one, two = by_cell.get((name, context, batch)), by_cell.get((other, context, batch))
                if one is not None and two is not None:
                    ratio = two[quantity] / one[quantity]
                    found.append(
                        {
                            "ratio": f"{quantity}: {other} / {name}",
                            "context": int(context),
                            "batch": int(batch),
                            "value": ratio,
                        }
                    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.contexts, args.batches, args.rounds, args.steps = [1024], [1], 1, 16
    if args.data is None:
        text = document(modules=_MODULES, characters=120_000)
    else:
        text = "\n\n".join(one.text for one in read_documents(args.data, limit=8))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").write_text(text, encoding="utf-8")
        ids = in_fresh_process(
            "bench.transformers_side", {"encode": str(folder / "text")}, threads=args.threads
        )["tokens"]
        if not isinstance(ids, list) or len(ids) < max(args.contexts):
            raise SystemExit(f"the text is shorter than a context of {max(args.contexts)} tokens")
        bench = Bench(folder, ids, args.steps, args.budget_tokens, args.threads, args.lock)
        wrong = gate(bench, args.systems)
        if wrong:
            print("the tokens are wrong, so no number is shown:", *wrong, sep="\n", file=sys.stderr)
            return 1
        _say(f"tokens agree over {GATE_STEPS} steps: {', '.join(args.systems)}")
        cells = [
            Cell(system, context, batch)
            for context in args.contexts
            for batch in args.batches
            for system in args.systems
        ]
        runs: dict[Cell, list[dict[str, Any]]] = {}
        for turn, cell in interleaved(cells, rounds=args.rounds):
            result = bench.run(cell)
            runs.setdefault(cell, []).append(result)
            _say(
                f"round {turn + 1} of {args.rounds}: {cell.system} context {cell.context} "
                f"batch {cell.batch}: {result['decode_ms']:.1f} ms a step, "
                f"prefill {result['prefill_s']:.1f} s"
            )
            _write(args, runs)
    rows = medians(runs)
    print(table(rows, COLUMNS), end="\n\n")
    print(table(ratios(rows), ("ratio", "context", "batch", "value")))
    return 0


def _write(args: argparse.Namespace, runs: dict[Cell, list[dict[str, Any]]]) -> None:
    """The JSON as far as it has come, so that an interrupted run is not lost."""
    if args.json is None:
        return
    rows = medians(runs)
    content = {
        "rows": rows,
        "ratios": ratios(rows),
        "environment": environment(threads=args.threads),
        "settings": {
            "model": "SmolLM2-135M-Instruct, float32",
            "steps": args.steps,
            "budget_tokens": args.budget_tokens,
            "rounds": args.rounds,
        },
    }
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and environment")
    parser.add_argument("--quick", action="store_true", help="1024 tokens, batch 1, one round")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 7900])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--systems", nargs="+", choices=CHOICES, default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument("--steps", type=int, default=48, help="decode steps in each round")
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, metavar="FILE", help="text or JSONL to read instead")
    parser.add_argument(
        "--lock", type=Path, metavar="FILE", help="held while a system is being measured"
    )
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
