"""Predicted against counted: bytes that stable heads load at reranks: `python -m bench.reload`.

The prediction needs no sparse run: it comes from RCO at the lag of the rerank interval, measured
while the model attends to everything. The count comes from a `flexi` run over the same prompt.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.timing import environment, table
from flexijax.config import CacheConfig
from flexijax.generate import generate
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.profiles import lookup
from flexijax.profiles.documents import Document, prompt_ids, read_documents
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.measure import Settings, averages, measure_prompt
from flexijax.profiles.plots import reload_bytes
from flexijax.sampling import Sampling
from flexijax.terminal import use_compilation_cache

COLUMNS = ("task", "index", "reranks", "predicted_mb", "counted_mb", "predicted_to_counted")


def measure_document(
    lm: LanguageModel,
    profile: HeadProfile,
    document: Document,
    settings: Settings,
    *,
    interval: int,
) -> dict[str, Any]:
    """One row: megabytes of all reranks over `settings.steps` decode steps."""
    assert lm.tokenizer is not None
    budget = settings.budgets[0]
    prompt = prompt_ids(document, lm.tokenizer, max_tokens=settings.max_tokens)
    record = measure_prompt(lm, prompt, settings, document=document)
    metrics = generate(
        lm,
        [prompt],
        max_new_tokens=settings.steps + 1,
        cache=CacheConfig(
            page_size=settings.page_size,
            budget_tokens=budget * settings.page_size,
            rerank_interval=interval,
        ),
        profile=profile,
        sampling=Sampling(ignore_eos=True),
    )[0].metrics
    page_bytes = 2 * settings.page_size * lm.attention.head_dim * np.dtype(lm.dtype).itemsize
    found = averages([record], settings, budget=budget)
    each = reload_bytes(profile, found, interval=interval, page_bytes=page_bytes)
    predicted, counted = each * metrics.reranks, metrics.promoted_bytes
    return {
        "task": document.task,
        "index": document.index,
        "reranks": metrics.reranks,
        "predicted_mb": predicted / 1e6,
        "counted_mb": counted / 1e6,
        "predicted_to_counted": predicted / max(counted, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    use_compilation_cache()
    lm = load(args.model)
    settings = Settings(
        budgets=(args.budget_tokens // 16,), steps=args.steps, max_tokens=args.max_tokens
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
    if args.json is not None:
        content = {"rows": rows, "environment": environment(threads=2)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
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
    parser.add_argument("--documents", type=int, default=1, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=5000, help="of a prompt")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--interval", type=int, default=16, help="steps between two reranks")
    parser.add_argument("--budget-tokens", type=int, default=1024)
    return parser


if __name__ == "__main__":
    sys.exit(main())
