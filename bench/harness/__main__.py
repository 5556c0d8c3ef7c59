"""Data for tasks, and likelihoods: `python -m bench.harness needle|leval|likelihoods ...`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness import data


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.what == "needle":
        documents = data.needles(args.count, args.tokens, seed=args.seed)
        print(f"{data.write(args.out, documents)} documents")
    elif args.what == "leval":
        print(f"{data.write(args.out, data.leval(args.data))} documents")
    else:
        _likelihoods(args)
    return 0


def _likelihoods(args: argparse.Namespace) -> None:
    # Not needed for the data, and heavy.
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    import flexijax
    from bench.harness.adapter import FlexijaxLM
    from flexijax.cli.terminal import use_compilation_cache

    use_compilation_cache()
    model = flexijax.load(args.model)
    cache = flexijax.CacheConfig(policy=args.policy, budget_tokens=args.budget_tokens)
    found = lm_eval.simple_evaluate(
        model=FlexijaxLM(model, cache, max_length=args.max_length),
        tasks=args.tasks,
        limit=args.limit,
        task_manager=TaskManager(include_path=args.include_path),
        bootstrap_iters=0,
    )
    assert found is not None
    print(json.dumps(found["results"], indent=1, default=str))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.harness", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    needle = commands.add_parser("needle", help="a sentence in generated text")
    needle.add_argument("--count", type=int, default=20)
    needle.add_argument("--tokens", type=int, default=4000, help="of each document, about")
    needle.add_argument("--seed", type=int, default=0)
    leval = commands.add_parser("leval", help="documents and questions of an L-Eval file")
    leval.add_argument("--data", type=Path, required=True, metavar="FILE")
    for one in (needle, leval):
        one.add_argument("--out", type=Path, required=True, metavar="FILE")
    scores = commands.add_parser("likelihoods", help="tasks of likelihoods, through decode steps")
    scores.add_argument("--model", default="smollm2")
    scores.add_argument("--policy", default="flexi")
    scores.add_argument("--budget-tokens", type=int, default=1024)
    scores.add_argument("--max-length", type=int, default=8192)
    scores.add_argument("--tasks", nargs="+", required=True)
    scores.add_argument("--include-path", help="a folder of tasks")
    scores.add_argument("--limit", type=int, help="documents of each task")
    return parser


if __name__ == "__main__":
    sys.exit(main())
