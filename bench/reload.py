"""Predicted against counted: bytes that stable heads load at reranks: `python -m bench.reload`.

The prediction needs no sparse run: it comes from RCO at the lag of the rerank interval, measured
while the model attends to everything. The count comes from `flexi`, fed the same tokens.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import results
from bench.timing import table
from flexijax.cli.terminal import use_compilation_cache
from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.policies.flexi import Flexi
from flexijax.policies.page_scores import SCORES
from flexijax.profiles import lookup
from flexijax.profiles.documents import Document, prompt_ids, read_documents
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.plots import reload_bytes
from flexijax.profiling.measure import record_prompt, reduced
from flexijax.profiling.settings import Settings
from flexijax.profiling.statistics import LAGS, averages

COLUMNS = (
    "task",
    "index",
    "tokens",
    "reranks",
    "rco",
    "rco_in_flexi",
    "predicted_mb",
    "counted_mb",
    "predicted_to_counted",
)


def measure_document(
    lm: LanguageModel,
    profile: HeadProfile,
    document: Document,
    settings: Settings,
    *,
    interval: int,
) -> dict[str, Any]:
    """One row: megabytes of all reranks over `settings.steps` decode steps.

    rco: mean over the stable heads at the lag of the interval, with all attended; rco_in_flexi: of
    the choices at the reranks themselves.
    """
    assert lm.tokenizer is not None
    budget = settings.budgets[0]
    prompt = prompt_ids(document, lm.tokenizer, max_tokens=settings.max_tokens)
    recording = record_prompt(lm, prompt, settings)
    found = averages(
        [reduced(recording, len(prompt), settings, document=document)], settings, budget=budget
    )
    program = make_program(
        lm,
        CacheConfig(
            # What the recording chose with; another score keeps its choices longer or less long.
            policy=Flexi(score=SCORES[settings.score]),
            page_size=settings.page_size,
            budget_tokens=budget * settings.page_size,
            rerank_interval=interval,
            profile=profile,
        ),
        max_tokens=settings.max_tokens + settings.steps,
    )
    steps = settings.steps // interval * interval
    fed = Continuation(lm, program, read(lm, [program], prompt))
    fed.feed(recording.tokens[:steps].tolist())
    heads = fed.stats.heads
    observed = np.array([of.rco for of in heads]) / np.array([of.choices for of in heads])
    page_bytes = program.layout.sizes.page_bytes
    each = reload_bytes(profile, found, interval=interval, page_bytes=page_bytes)
    stable = [
        found.lags[interval][layer, list(profile.stable_heads(layer))]
        for layer in range(profile.num_layers)
    ]
    predicted, counted = each * steps / interval, fed.stats.promoted_pages * page_bytes
    return {
        "task": document.task,
        "index": document.index,
        "tokens": len(prompt),
        "reranks": steps // interval,
        "rco": float(np.concatenate(stable).mean()),
        "rco_in_flexi": float(observed.mean()),
        "predicted_mb": predicted / 1e6,
        "counted_mb": counted / 1e6,
        "predicted_to_counted": predicted / max(counted, 1),
        "rco_by_head": np.concatenate(stable).tolist(),
        "rco_in_flexi_by_head": observed.tolist(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.interval not in LAGS:
        raise SystemExit(f"--interval={args.interval} must be one of {', '.join(map(str, LAGS))}")
    use_compilation_cache()
    lm = load(args.model)
    settings = Settings(
        budgets=(args.budget_tokens // 16,),
        steps=args.steps,
        max_tokens=args.max_tokens,
        score=args.score,
    )
    shipped = lookup.find(lm, settings.budgets[0])
    profile = shipped if args.profile is None else lookup.load(args.profile)
    if profile is None:
        raise SystemExit(f"no profile of {lm.name} is shipped: name one with --profile")
    rows = []
    for path in args.data:
        for document in read_documents(path, limit=args.documents):
            row = measure_document(lm, profile, document, settings, interval=args.interval)
            rows.append(row)
            print(table([row], COLUMNS), file=sys.stderr, flush=True)
    results.write(args.json, "reload", args, rows=rows)
    print(table(rows, COLUMNS))
    total = sum(row["predicted_mb"] for row in rows) / sum(row["counted_mb"] for row in rows)
    print(f"all documents together: predicted / counted = {total:.2f}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.reload", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--profile", help="name or file; default: the shipped one of the model")
    parser.add_argument("--score", choices=SCORES, default=Settings().score, help="of pages")
    parser.add_argument("--documents", type=int, default=1, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=5000, help="of a prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--interval", type=int, default=16, help="steps between two reranks")
    parser.add_argument("--budget-tokens", type=int, default=1024)
    return parser


if __name__ == "__main__":
    sys.exit(main())
