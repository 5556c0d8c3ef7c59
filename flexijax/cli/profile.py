"""`flexijax profile`: measures a model's head stability on your text and writes its profile."""

import argparse
from pathlib import Path

import numpy as np

from flexijax.cli.terminal import Progress, check_writable, table, write_json
from flexijax.models.load import load
from flexijax.profiles import plots, report
from flexijax.profiles.documents import Document, read_documents
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiling.measure import measure_documents
from flexijax.profiling.profile import make_profile
from flexijax.profiling.settings import LOST_MASS, RANKINGS, RCO, Settings
from flexijax.profiling.statistics import averages

NAME = "profile"
HELP = "measure which KV heads of a model keep choosing the same pages"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    default = Settings()
    add = parser.add_argument
    add("--model", required=True, help="smollm2, a Hugging Face folder or hub id, or a .gguf file")
    add(
        "--data",
        required=True,
        type=Path,
        nargs="+",
        metavar="FILE",
        help="a task each: JSON lines with a text field, or plain text",
    )
    add("--out", required=True, type=Path, metavar="P.json", help="the profile to write")
    add("--plot", type=Path, metavar="DIR", help="also pictures and report.md (needs matplotlib)")
    add("--field", help="of the JSON lines that holds the text (default: the first known one)")
    add("--documents", type=int, default=5, metavar="N", help="of each task (default: 5)")
    add("--skip", type=int, default=0, metavar="N", help="first documents to leave out")
    add("--max-tokens", type=int, default=default.max_tokens, metavar="N", help="of a prompt")
    add("--steps", type=int, default=default.steps, help="decode steps a document")
    add("--page-size", type=int, default=default.page_size, metavar="N")
    add(
        "--budgets",
        type=int,
        nargs="+",
        default=[budget * default.page_size for budget in default.budgets],
        metavar="TOKENS",
        help="several at once; the first is the one of P.json, others go to P.TOKENS.json",
    )
    add("--window", type=int, default=default.window, help="steps over which RCO is averaged")
    add("--fraction", type=float, default=default.fraction, help="of all heads, called unstable")
    add("--score", choices=RANKINGS, default=default.score, help="what ranks the pages")
    add(
        "--unstable-by",
        choices=(LOST_MASS, RCO),
        default=default.unstable_by,
        help="the heads called unstable: those that lose most attention by an old choice, or those "
        "of the least RCO",
    )


def run(args: argparse.Namespace) -> int:
    """Carries the command out; bad input raises ValueError or OSError before the model loads."""
    if args.page_size < 1:
        raise ValueError(f"--page-size={args.page_size} must be at least 1")
    wrong = [budget for budget in args.budgets if budget % args.page_size]
    if wrong:
        raise ValueError(f"--budgets={wrong} must be multiples of --page-size={args.page_size}")
    if len(args.data) != len({path.stem for path in args.data}):
        raise ValueError("--data names a task twice: the name of a file is its task")
    for name, least in (("documents", 1), ("skip", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} must be at least {least}")
    first = args.budgets[0] // args.page_size
    settings = Settings(
        page_size=args.page_size,
        budgets=tuple(sorted({budget // args.page_size for budget in args.budgets})),
        window=args.window,
        fraction=args.fraction,
        steps=args.steps,
        max_tokens=args.max_tokens,
        score=args.score,
        unstable_by=args.unstable_by,
    )
    if args.plot is not None:
        plots.pyplot()
    check_writable(args.out)
    if args.json is not None:
        check_writable(args.json)
    tasks = [_documents(path, args) for path in args.data]
    progress = Progress(quiet=args.quiet)
    loading = f"loading {args.model}"
    progress(loading, 0, 100)
    lm = load(args.model, progress=lambda share: progress(loading, min(int(100 * share), 99), 100))
    progress(loading, 100, 100)
    records = measure_documents(
        lm,
        [document for task in tasks for document in task],
        settings,
        records=args.out.with_suffix(".records.jsonl"),
        progress=lambda done, total, _: progress("measuring", done, total),
    )
    profiles = {
        budget: make_profile(lm, records, settings, budget=budget) for budget in settings.budgets
    }
    for budget, profile in profiles.items():
        tokens = budget * settings.page_size
        profile.save(args.out if budget == first else args.out.with_suffix(f".{tokens}.json"))
    profile = profiles[first]
    if args.plot is not None:
        shape = lm.attention
        itemsize = np.dtype(lm.dtype).itemsize
        page_bytes = 2 * settings.page_size * shape.head_dim * itemsize
        found = averages(records, settings, budget=first)
        pictures = plots.draw_all(profile, found, args.plot, page_bytes=page_bytes)
        report.write_report(profile, pictures, args.plot)
    if not args.quiet:
        print(table(summary(profile)))
        print("\n" + report.agreement(profile))
    if args.json is not None:
        write_json(args.json, {"profile": profile, "unstable_by_budget": _lists(profiles)})
    return 0


def summary(profile: HeadProfile) -> list[list[str]]:
    """The closing table of one profile."""
    heads = [f"{layer}.{head}" for layer, head in profile.unstable]
    shown = " ".join(heads[:24]) + (" ..." if len(heads) > 24 else "")
    total = profile.num_layers * profile.num_kv_heads
    measured = profile.measured
    return [
        ["model", f"{profile.model} ({profile.fingerprint})"],
        ["budget", f"{profile.budget_pages} pages of {profile.page_size} tokens"],
        ["unstable heads", f"{len(heads)} of {total}: {shown}"],
        ["attention mass held", str(measured["mean_attention_mass"])],
        ["pairs of steps left out", str(measured["undefined_pairs"])],
    ]


def _documents(path: Path, args: argparse.Namespace) -> list[Document]:
    found = read_documents(path, limit=args.documents + args.skip, field=args.field)[args.skip :]
    if not found:
        raise ValueError(f"--skip={args.skip} leaves no document of {path}")
    return found


def _lists(profiles: dict[int, HeadProfile]) -> dict[str, list[list[int]]]:
    return {str(budget): [list(head) for head in p.unstable] for budget, p in profiles.items()}
