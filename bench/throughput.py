"""Many requests in the same memory: `python -m bench.throughput --data TASK.jsonl ...`.

Each policy gets the same bytes of device memory and the same prompts, all submitted at once, and
runs them to their end in `flexijax.Engine`. Reported are the requests that held a row on average,
generated tokens a second of decoding, and all tokens a second of everything, prompts counted.
Every measurement is a fresh process, and policies take turns.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.timing import in_fresh_process, interleaved, median, table
from flexijax.models.load import load
from flexijax.profiles.documents import read_documents

POLICIES = ("full", "flexi")
COLUMNS = (
    *("policy", "new_tokens", "rows", "running", "decode_tokens_per_s", "tokens_per_s"),
    *("ttft_s", "longest_gap_s", "pauses", "seconds", "peak_bytes", "rounds"),
)
_MEASURED = (
    *("rows", "running", "decode_tokens_per_s", "tokens_per_s", "longest_gap_s", "pauses"),
    *("seconds", "peak_bytes"),
)


def prompts_of(
    files: Sequence[Path], *, count: int, shortest: int, longest: int
) -> list[list[int]]:
    """`count` pieces of real text, of evenly spread lengths; each begins somewhere else.

    Raises ValueError where the files hold too little text.
    """
    tokenizer = load("smollm2").tokenizer
    assert tokenizer is not None
    documents = [one for path in files for one in read_documents(path, limit=8)]
    text: list[int] = []
    for one in documents:
        text += tokenizer.encode(one.text)
    if len(text) < count * longest:
        raise ValueError(f"{len(text)} tokens of text are too few for {count} of {longest}")
    step = (longest - shortest) / max(count - 1, 1)
    return [text[at * longest : at * longest + round(shortest + at * step)] for at in range(count)]


def medians(runs: dict[tuple[str, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row a policy and number of new tokens, with the median of every number."""
    rows = []
    for (policy, new_tokens), found in runs.items():
        row: dict[str, Any] = {"policy": policy, "new_tokens": new_tokens}
        row |= {name: median([one[name] for one in found]) for name in _MEASURED}
        row["ttft_s"] = median([seconds for one in found for seconds in one["ttft_s"]])
        rows.append(row | {"rounds": len(found)})
    return rows


def ratios(rows: Sequence[dict[str, Any]], base: str) -> list[dict[str, Any]]:
    """Each policy's figures over those of `base` with as many new tokens; above 1 is better."""
    bases = {row["new_tokens"]: row for row in rows if row["policy"] == base}
    names = ("running", "decode_tokens_per_s", "tokens_per_s")
    return [
        {"policy": row["policy"], "new_tokens": row["new_tokens"]}
        | {name: row[name] / bases[row["new_tokens"]][name] for name in names}
        for row in rows
        if row["policy"] != base and row["new_tokens"] in bases
    ]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    shortest, longest = args.prompt_tokens
    prompts = prompts_of(args.data, count=args.requests, shortest=shortest, longest=longest)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "prompts.json")
        path.write_text(json.dumps(prompts))
        cells = [(policy, new) for new in args.new_tokens for policy in args.policies]
        for turn, (policy, new_tokens) in interleaved(cells, rounds=args.rounds):
            # Whatever room a row has beyond this is memory that no request can use.
            most = args.max_context or longest + new_tokens
            # What one holds on average: rows are made for that, and a row that finds no block when
            # all have grown long waits for one that ends.
            usual = (shortest + longest + new_tokens) // 2
            spec: dict[str, Any] = {
                "prompts_file": str(path),
                "new_tokens": new_tokens,
                "policy": policy,
                "budget_tokens": args.budget_tokens,
                "device_bytes": args.device_bytes,
                "max_requests": args.max_requests,
                "max_context": most,
                "usual_context": min(usual, most),
                "prefill_first": args.prefill_first,
            }
            result = in_fresh_process(
                "bench.engine_side", spec, threads=args.threads, lock=args.lock
            )
            runs.setdefault((policy, new_tokens), []).append(result)
            print(
                f"round {turn + 1} of {args.rounds}: {policy}, {new_tokens} new tokens: "
                f"{result['running']:.1f} of {result['rows']} rows, "
                f"{result['decode_tokens_per_s']:.1f} tokens a second of decoding",
                file=sys.stderr,
                flush=True,
            )
            _write(args, runs)
    rows = medians(runs)
    print(table(rows, COLUMNS), end="\n\n")
    print(
        table(
            ratios(rows, args.policies[0]),
            ("policy", "new_tokens", "running", "decode_tokens_per_s", "tokens_per_s"),
        )
    )
    return 0


def _write(args: argparse.Namespace, runs: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    """The JSON as far as it has come, so that an interrupted run is not lost."""
    rows = medians(runs)
    of_base = ratios(rows, args.policies[0])
    results.write(args.json, "throughput", args, rows=rows, ratios=of_base)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and environment")
    parser.add_argument(
        "--policies", nargs="+", default=list(POLICIES), help="the first is the base"
    )
    parser.add_argument("--device-bytes", default="1GiB", help="for each policy's engine")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[6500, 7000])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--max-requests", type=int, default=8)
    parser.add_argument("--max-context", type=int, help="of a request; default: what they need")
    parser.add_argument(
        "--prefill-first", action="store_true", help="nothing decodes while a prompt is read"
    )
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lock", type=Path, metavar="FILE", help="held while one is measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
