"""What profiling costs beside generating the same tokens: `python -m bench.profile_cost`.

Both read the same prompts and say the same tokens, one prompt after the other, taking turns. A
first turn compiles and is not counted. No ratio is shown unless both said the same.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from bench import results
from bench.timing import table
from flexijax.cli.terminal import use_compilation_cache
from flexijax.config import CacheConfig
from flexijax.engine.sampling import Sampling
from flexijax.generate import generate
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.profiles.documents import Document, prompt_ids, read_documents
from flexijax.profiling.measure import record_prompt, reduced
from flexijax.profiling.settings import Settings

COLUMNS = ("task", "index", "prompt", "profile_s", "full_s", "ratio")


def measure_document(lm: LanguageModel, document: Document, settings: Settings) -> dict[str, Any]:
    """One row: seconds of either, compilation included where there was any."""
    assert lm.tokenizer is not None
    prompt = prompt_ids(document, lm.tokenizer, max_tokens=settings.max_tokens)
    started = time.perf_counter()
    recording = record_prompt(lm, prompt, settings)
    reduced(recording, len(prompt), settings, document=document)
    profiled = time.perf_counter()
    out = generate(
        lm,
        [prompt],
        max_new_tokens=settings.steps + 1,
        cache=CacheConfig(policy="full", page_size=settings.page_size),
        sampling=Sampling(ignore_eos=True),
    )[0]
    generated = time.perf_counter()
    # Where full would end its answer, the profiler takes the next best token and goes on.
    stops = lm.end_ids
    said = list(takewhile(lambda token: token not in stops, out.token_ids))
    if recording.tokens[: len(said)].tolist() != said:
        raise RuntimeError(f"the two disagree on what follows {document.task}[{document.index}]")
    return {
        "task": document.task,
        "index": document.index,
        "prompt": len(prompt),
        "profile_s": profiled - started,
        "full_s": generated - profiled,
        "ratio": (profiled - started) / (generated - profiled),
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    use_compilation_cache()
    lm = load(args.model)
    settings = Settings(steps=args.steps, max_tokens=args.max_tokens)
    documents = read_documents(args.data, limit=args.documents)
    measure_document(lm, documents[0], settings)
    rows = []
    for document in documents:
        rows.append(measure_document(lm, document, settings))
        print(table(rows[-1:], COLUMNS), file=sys.stderr, flush=True)
    profile_s, full_s = (sum(row[name] for row in rows) for name in ("profile_s", "full_s"))
    results.write(args.json, "profile_cost", args, ratio=profile_s / full_s, rows=rows)
    print(table(rows, COLUMNS))
    print(f"all {len(rows)} documents: profiling takes {profile_s / full_s:.2f} times as long")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_cost", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="one task")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=5000, help="of a prompt")
    parser.add_argument("--steps", type=int, default=64)
    return parser


if __name__ == "__main__":
    sys.exit(main())
