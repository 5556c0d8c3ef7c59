"""Fixed rerank intervals against adaptive ones: `python -m bench.rerank`.

Every system is fed full attention's own greedy answer to real documents, token by token: what is
the divergence of its next-token distributions from full attention's (nats a token), how often do
they agree on the best token, and how many pages do its reranks bring from the host?
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.agreement import compare
from bench.timing import environment, table
from flexijax.cli.terminal import use_compilation_cache
from flexijax.config import ADAPTIVE, CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.prefill import Program
from flexijax.generate import make_program
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.policies.base import Flexi
from flexijax.profiles import lookup
from flexijax.profiles.documents import Document, prompt_ids, read_documents
from flexijax.profiles.records import Records

COLUMNS = (
    "system",
    "kl",
    "agreement",
    "promoted_a_token",
    "promoted_to_16",
    "mean_interval",
    "documents",
    "tokens",
)
BASE = "16"


def programs(
    lm: LanguageModel,
    *,
    intervals: Sequence[int],
    thresholds: Sequence[tuple[float, float]],
    budget_tokens: int,
    max_tokens: int,
    profile: str | None,
) -> dict[str, Program]:
    """The static part of "full", of each fixed interval and of each pair of thresholds.

    thresholds: (RCO from which an interval is doubled, RCO below which it is halved) each; the
    library's own when empty.
    """

    def make(**changes: Any) -> Program:
        cache = CacheConfig(budget_tokens=budget_tokens, **changes)
        found = None if profile is None else lookup.load(profile)
        return make_program(lm, cache, profile=found, max_tokens=max_tokens, rows=1)

    made = {"full": make(mode="full")}
    made |= {str(interval): make(rerank_interval=interval) for interval in intervals}
    adaptive = make(rerank_interval=ADAPTIVE)
    if not thresholds:
        return {**made, ADAPTIVE: adaptive}
    policy = adaptive.policy
    assert isinstance(policy, Flexi) and policy.intervals is not None
    for high, low in thresholds:
        pace = dataclasses.replace(policy.intervals, lengthen_at=high, shorten_at=low)
        made[f"{ADAPTIVE} {high} {low}"] = dataclasses.replace(
            adaptive, policy=dataclasses.replace(policy, intervals=pace)
        )
    return made


def measure_document(
    lm: LanguageModel, made: dict[str, Program], document: Document, *, max_tokens: int, steps: int
) -> list[dict[str, Any]]:
    """One row a system, over the answer up to its end in whole chunks of every system.

    made: of `programs`. max_tokens: of the prompt, which is read once for all. steps: longest
    answer. Empty where the answer ends within the first chunk.
    """
    assert lm.tokenizer is not None
    chunk = int(np.lcm.reduce([program.rerank_interval for program in made.values()]))
    prompt = prompt_ids(document, lm.tokenizer, max_tokens=max_tokens)
    reading = read(lm, made["full"], prompt)
    said = Continuation(lm, made["full"], reading).greedy(-(-steps // chunk) * chunk)
    stops = [at for at, token in enumerate(said) if token in lm.tokenizer.stop_ids]
    said = said[: min([*stops, len(said)]) // chunk * chunk]
    if not said:
        return []
    full = Continuation(lm, made["full"], reading).feed(said)
    # Logits after token i say what comes as token i + 1: full's own choice, or the bench is wrong.
    if not np.array_equal(full.argmax(-1)[:-1], np.array(said[1:])):
        raise RuntimeError("full attention, fed its own tokens, does not choose them again")
    rows = []
    for system, program in made.items():
        if system == "full":
            continue
        fed = Continuation(lm, program, reading)
        same, kl = compare(full, fed.feed(said))
        heads = [of for of in fed.cache.counters.heads if of is not None]
        reranks = sum(int(of.reranks[0].sum()) for of in heads)
        rows.append(
            {
                "system": system,
                "task": document.task,
                "index": document.index,
                "context": len(prompt),
                "tokens": len(said),
                "kl": float(kl.mean()),
                "agreement": float(same.mean()),
                "promoted": fed.promoted,
                "mean_interval": len(said) * program.layout.num_slotted / reranks,
            }
        )
    return rows


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every document weighing the same: one row a system."""
    systems = list(dict.fromkeys(row["system"] for row in rows))

    def mean(system: str, value: str) -> float:
        return float(np.mean([row[value] for row in rows if row["system"] == system]))

    rows = [{**row, "promoted_a_token": row["promoted"] / row["tokens"]} for row in rows]
    base = mean(BASE, "promoted_a_token") if BASE in systems else float("nan")
    return [
        {
            "system": system,
            **{name: mean(system, name) for name in ("kl", "agreement", "promoted_a_token")},
            "promoted_to_16": mean(system, "promoted_a_token") / base,
            "mean_interval": mean(system, "mean_interval"),
            "documents": sum(row["system"] == system for row in rows),
            "tokens": sum(row["tokens"] for row in rows if row["system"] == system),
        }
        for system in systems
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    use_compilation_cache()
    lm = load(args.model)
    made = programs(
        lm,
        intervals=args.intervals,
        thresholds=[tuple(pair) for pair in args.thresholds],
        budget_tokens=args.budget_tokens,
        max_tokens=args.max_tokens + args.steps + 64,
        profile=args.profile,
    )
    documents = [one for path in args.data for one in read_documents(path, limit=args.documents)]
    settings = [args.max_tokens, args.steps, repr([program.policy for program in made.values()])]
    records, rows = Records(args.records), []
    for at, document in enumerate(documents):
        key = [lm.fingerprint, lm.name, document.text, document.instruction, *settings]
        found = records.get(*key)
        if found is None:
            found = measure_document(
                lm, made, document, max_tokens=args.max_tokens, steps=args.steps
            )
            records.add(*key, value=found)
        rows += found
        shown = ", ".join(f"{r['system']}: {r['kl']:.3f} {r['promoted']}" for r in found)
        name = f"{document.task}[{document.index}]"
        print(f"{at + 1} of {len(documents)} {name}: {shown}", file=sys.stderr, flush=True)
    if not rows:
        print("every answer ended within the first chunk", file=sys.stderr)
        return 1
    if args.json is not None:
        content = {"rows": means(rows), "documents": rows, "environment": environment(threads=2)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(means(rows), COLUMNS))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.rerank", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--records", type=Path, metavar="FILE", help="finished documents: go on")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--profile", help="name or file; default: the shipped one of the model")
    parser.add_argument("--documents", type=int, default=2, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=5000, help="of a prompt")
    parser.add_argument("--steps", type=int, default=256, help="longest answer, tokens")
    parser.add_argument("--intervals", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("HIGH", "LOW"),
        help="RCO that doubles an interval and RCO that halves it; repeatable (default: ours)",
    )
    parser.add_argument("--budget-tokens", type=int, default=1024)
    return parser


if __name__ == "__main__":
    sys.exit(main())
