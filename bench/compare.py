"""XLA against PyTorch on the same weights, prompts, budget and threads: `python -m bench.compare`.

Systems: transformers with its dynamic and its static cache, SnapKV by kvpress where it is
installed, FlexiCache in PyTorch (`bench.pytorch_flexicache`), eager and by `torch.compile`, and
flexijax's policies. Every measurement is a fresh process, so that memory is honest, and systems
take turns, so that a slow minute of the machine meets all of them. Before anything is timed

    within the budget   all greedy tokens must be those of transformers;
    at the context      fed one answer, those that attend to everything must have its distribution;
    step by step        FlexiCache in both must attend to the same pages, see `bench.same_pages`.

Of a system that fails no time is taken or shown, and the bench ends with 1.
"""

import argparse
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import results
from bench.sides import DENSE, FLEXI, SYSTEMS, Bench, Cell, tiny_model
from bench.timing import interleaved, median, table
from flexijax import policies
from flexijax.demo import document
from flexijax.profiles.documents import read_documents

CHOICES = tuple(dict.fromkeys((*SYSTEMS, *policies.names())))
DEFAULT = (
    *("transformers", "transformers_static", "torch_flexi", "torch_flexi_compiled"),
    *("snapkv_kvpress", "full", "quest", "flexi"),
)
COLUMNS = (
    *("system", "context", "batch", "prefill_s", "decode_ms", "low_ms", "high_ms"),
    *("tokens_per_s", "peak_mb", "device_kv_mb", "compile_s", "rounds"),
)
# Nats at most between systems that attend to everything; between those that attend to the same
# pages, of which some at the cut may be others.
SAME, ALIKE = 1e-4, 2e-3
_MEASURED = ("prefill_s", "decode_ms", "peak_bytes", "device_kv_bytes", "compile_s")
_MODULES = ("argparse", "subprocess", "socket", "typing", "unittest", "logging", "decimal")


def gate(bench: Bench, systems: Sequence[str]) -> dict[str, str]:
    """What is wrong with the tokens of a system within the budget, where all attend to all."""
    tokens = {}
    for system in systems:
        _say(f"checking the tokens of {system}")
        tokens[system] = bench.run(Cell(system, bench.gate_context, 1), steps=bench.gate_steps)[
            "tokens"
        ]
    truth = "transformers" if "transformers" in tokens else next(iter(tokens))
    return {
        system: f"says {found}, {truth} says {tokens[truth]}"
        for system, found in tokens.items()
        if found != tokens[truth]
    }


def closeness(bench: Bench, systems: Sequence[str], context: int) -> list[dict[str, Any]]:
    """A row a pair: KL of the second's distribution from the first's, and equal choices.

    All are fed the greedy answer of the first.
    """
    answer = bench.run(Cell(systems[0], context, 1), steps=bench.fed)["tokens"][0][: bench.fed]
    found = {}
    for system in systems:
        _say(f"feeding {system} at {context} tokens")
        found[system] = np.load(bench.feed(Cell(system, context, 1), answer))
    return [
        {"system": one, "other": other, "context": context} | divergence(found[one], found[other])
        for one, other in itertools.permutations(systems, 2)
    ]


def divergence(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Mean KL in nats and the share of equal choices, of logits float[T, V]."""
    expected, found = (x.astype(np.float64) for x in (expected, found))
    expected, found = (x - x.max(-1, keepdims=True) for x in (expected, found))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (expected, found))
    return {
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def too_far(rows: Sequence[dict[str, Any]], systems: Sequence[str]) -> dict[str, str]:
    """Systems that must have a distribution which they have not: all attention, or all pages."""
    wrong = {}
    for alike, most in ((DENSE, SAME), (FLEXI, ALIKE)):
        mine = [system for system in alike if system in systems]
        for row in rows:
            # Not `> most`, which no NaN is.
            if mine and row["system"] == mine[0] and row["other"] in mine and not row["kl"] <= most:
                wrong[row["other"]] = f"{row['kl']:.2g} nats from {mine[0]}, at most {most}"
    return wrong


def medians(runs: dict[Cell, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a cell, with the median of every number over its rounds, and the steps' range."""
    rows = []
    for cell, found in runs.items():
        measured = {name: median([one[name] for one in found]) for name in _MEASURED}
        measured |= {name: int(measured[name]) for name in ("peak_bytes", "device_kv_bytes")}
        steps = [one["decode_ms"] for one in found]
        rows.append(
            asdict(cell)
            | measured
            | {"low_ms": min(steps), "high_ms": max(steps), "rounds": len(found)}
            | {"tokens_per_s": 1e3 * cell.batch / measured["decode_ms"]}
            | {f"{name}_mb": measured[f"{name}_bytes"] / 1e6 for name in ("peak", "device_kv")}
        )
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times as fast, or small, each system is as the best setting of transformers."""
    found = []
    for row in rows:
        peers = [
            one
            for one in rows
            if one["system"].startswith("transformers")
            and (one["context"], one["batch"]) == (row["context"], row["batch"])
        ]
        if peers and row["system"] not in [one["system"] for one in peers]:
            shared = {name: row[name] for name in ("system", "context", "batch")}
            names = ("decode_ms", "prefill_s", "peak_bytes")
            best = {name: min(one[name] for one in peers) / row[name] for name in names}
            found.append(shared | best)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if args.work is None else args.work
        folder.mkdir(exist_ok=True)
        if args.quick:
            quick = tiny_model(Path(name))
            vars(args).update(quick, contexts=[quick["pages_context"]], batches=[1], rounds=1)
        bench = Bench.of(args, folder)
        bench.token_ids = _text(args, bench)
        return _run(args, bench)


def _run(args: argparse.Namespace, bench: Bench) -> int:
    systems, without = list(args.systems), {}
    if "snapkv_kvpress" in systems and importlib.util.find_spec("kvpress") is None:
        without["snapkv_kvpress"] = "kvpress is not installed: see bench.kvpress_ranks"
    for system in systems:
        if system.endswith("compiled") and (why := _no_compiler()) is not None:
            without[system] = why
    systems = [system for system in systems if system not in without]
    for system, why in without.items():
        _say(f"without {system}: {why}")
    wrong, pages = gate(bench, systems), None
    if {"flexi", "torch_flexi"} <= set(systems):
        _say("comparing the pages of FlexiCache in both, step by step")
        pages = bench.pages(args.pages_context)
        if pages["wrong"]:
            wrong["torch_flexi"] = wrong["torch_flexi_compiled"] = "; ".join(pages["wrong"])
    right, close = [system for system in systems if system not in wrong], []
    for context in args.contexts:
        close += closeness(bench, right, context)
    wrong |= too_far(close, right)
    right = [system for system in right if system not in wrong]
    for system, why in wrong.items():
        print(f"{system} is wrong, so no time of it is shown: {why}", file=sys.stderr)
    print(table(close, ("system", "other", "context", "kl", "agreement")), end="\n\n")
    found: dict[str, Any] = {"closeness": close, "pages": pages, "wrong": wrong}
    found |= {"without": without, "rows": [], "ratios": []}
    results.write(args.json, "compare", args, **found)
    cells = [
        Cell(system, context, batch)
        for context in args.contexts
        for batch in args.batches
        for system in right
    ]
    runs: dict[Cell, list[dict[str, Any]]] = {}
    for turn, cell in interleaved(cells, rounds=args.rounds):
        one = bench.run(cell, turn=turn)
        runs.setdefault(cell, []).append(one)
        if not args.quick:
            _say(
                f"round {turn + 1} of {args.rounds}: {cell.system} context {cell.context} batch "
                f"{cell.batch}: {one['decode_ms']:.1f} ms a step, prefill {one['prefill_s']:.1f} s"
            )
            rows = medians(runs)
            found |= {"rows": rows, "ratios": ratios(rows)}
            results.write(args.json, "compare", args, **found)
    if not args.quick:
        print(table(found["rows"], COLUMNS), end="\n\n")
        print("how many times as good as the best setting of transformers")
        print(table(found["ratios"], tuple(found["ratios"][0]) if found["ratios"] else ()))
    return 1 if wrong else 0


def _no_compiler() -> str | None:
    from bench.pytorch_flexicache import can_compile

    return can_compile()


def _text(args: argparse.Namespace, bench: Bench) -> list[int]:
    """Token ids that prompts are cut from."""
    if args.quick:
        return np.random.default_rng(0).integers(0, 97, 4 * max(args.contexts)).tolist()
    if args.data is None:
        text = document(modules=_MODULES, characters=120_000)
    else:
        text = "\n\n".join(one.text for one in read_documents(args.data, limit=8))
    ids = bench.encode(text)
    if len(ids) < max(args.contexts):
        raise SystemExit(f"the text is shorter than a context of {max(args.contexts)} tokens")
    return ids


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that was found")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model in this process: gates, and no times"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--systems", nargs="+", choices=CHOICES, default=list(DEFAULT))
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument("--steps", type=int, default=48, help="decode steps in each round")
    parser.add_argument("--fed", type=int, default=64, help="steps of the distributions compared")
    parser.add_argument("--pages-context", type=int, default=2048, help="where pages are compared")
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", default="smollm2", help="or a folder of Hugging Face")
    parser.add_argument("--profile", default="smollm2-135m", help="name or file")
    parser.add_argument("--data", type=Path, metavar="FILE", help="text or JSONL to read instead")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keeps what is measured: a run goes on from it"
    )
    parser.add_argument(
        "--lock", type=Path, metavar="FILE", help="held while a system is being measured"
    )
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
