"""What answers are worth under each cache method, as a share of full attention's: `bench.accuracy`.

    python -m bench.accuracy --data TASK.jsonl ... --documents 5 --configs full flexi quest:512

Each prompt is read once and answered greedily by every config, named as in `bench.closeness`; the
first is what the others are compared with. Three kinds of tasks:

- files in L-Eval's form, the first question of each document, cut at the end to --prompt-tokens;
  answers are as long as the reference, at most --new-tokens. Scored by ROUGE-L, or the F1 of
  tokens where the task's `evaluation` says so;
- needles: a number at a depth of generated text, asked for; a cell for every depth, length and
  number of such sentences;
- evidence: records that stand in generated text, all to be given as JSON; scored by records found.

Retention is the mean over tasks of mean score / full's mean score; its interval resamples
documents. A task that full attention itself cannot do says nothing of the others, is named and left
out of the mean: where its score is below --floor, or not above what its answers get against the
references of other documents. `--records FILE` keeps answers, so that a long run can go on;
`--quick` is little of everything.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import results
from bench.accuracy_answers import Answers
from bench.accuracy_scores import METRICS, chance, ratio, retention
from bench.accuracy_tasks import (
    NEEDLE_TOKENS,
    NEEDLES,
    RECORD_TOKENS,
    Case,
    evidence,
    from_leval,
    needles,
)
from bench.closeness import parse
from bench.timing import table
from flexijax.cli.terminal import Progress, use_compilation_cache
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.profiles.documents import prompt_ids

CONFIGS = (
    "full",
    *(f"{name}:{tokens}" for name in ("quest", "flexi") for tokens in (512, 1024, 2048)),
)
COLUMNS = ("config", "retention", "low", "high", "tasks", "documents", "needles", "needle_cells")
TASK_COLUMNS = (
    "task",
    "config",
    "metric",
    "score",
    "ratio",
    "low",
    "high",
    "documents",
    "left_out",
)
QUICK: dict[str, Any] = {
    "documents": 1,
    "prompt_tokens": [64, 512],
    "new_tokens": 16,
    "needle_tokens": [256],
    "needle_depths": [0.5],
    "needle_numbers": [1],
    "evidence": 1,
    "evidence_tokens": 256,
    "evidence_records": 2,
}


def cases(lm: LanguageModel, args: argparse.Namespace) -> Iterator[Case]:
    """Everything that is asked: one document of every file in turn, needles, records."""
    tokenizer = lm.tokenizer
    assert tokenizer is not None

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    def is_long(case: Case) -> bool:
        least, most = args.prompt_tokens
        return len(prompt_ids(case.document, tokenizer, max_tokens=most)) >= least

    read = [from_leval(path, new_tokens=args.new_tokens, count=count) for path in args.data]
    waiting = [filter(is_long, of) for of in read]
    for _ in range(args.documents):
        for of in waiting:
            yield from itertools.islice(of, 1)
    cells = (args.needle_tokens, args.needle_numbers, args.needle_depths)
    for tokens, number, depth in itertools.product(*cells):
        yield needles(depth, tokens, number, seed=args.seed, count=count)
    for at in range(args.evidence):
        size = (args.evidence_tokens, args.evidence_records)
        yield evidence(at, *size, seed=args.seed, count=count)


def summary(
    answered: Sequence[tuple[Case, Mapping[str, Mapping[str, Any]]]], *, floor: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, tasks): one row a config, one a task and config, as plain JSON values.

    answered: cases with the answers of all configs, the first of which is full attention's.
    """
    base, *_ = configs = list(answered[0][1])
    scores: dict[str, dict[str, list[float]]] = {name: {} for name in configs}
    asked: dict[str, list[tuple[Case, str]]] = {}
    for case, answers in answered:
        task = case.document.task
        asked.setdefault(task, []).append((case, answers[base]["text"]))
        for name, answer in answers.items():
            score = METRICS[case.metric](answer["text"], case.references)
            scores[name].setdefault(task, []).append(score)
    why = {task: _why_left_out(of, scores[base][task], floor) for task, of in asked.items()}
    tasks = [
        _task_row(task, name, of[0][0].metric, scores[name][task], scores[base][task], why[task])
        for task, of in asked.items()
        for name in configs
    ]
    rows = []
    for name in configs:
        kept = {task: of for task, of in scores[name].items() if not why[task]}
        mean, low, high = retention(kept, scores[base])
        row = {"config": name, "retention": mean, "low": low, "high": high, "tasks": len(kept)}
        row["documents"] = sum(map(len, kept.values()))
        if NEEDLES in asked:
            row["needles"] = int(sum(scores[name][NEEDLES]))
            row["needle_cells"] = len(asked[NEEDLES])
        rows.append(row)
    return rows, tasks


def _why_left_out(asked: Sequence[tuple[Case, str]], scores: Sequence[float], floor: float) -> str:
    """Why a task says nothing; "" where full attention can do it."""
    own = float(np.mean(scores))
    if own < floor:
        return f"full scores {own:.3f}, below {floor:g}"
    by_chance = chance(
        [answer for _, answer in asked], [case.references for case, _ in asked], asked[0][0].metric
    )
    if by_chance is not None and own <= by_chance:
        return f"full scores {own:.3f}, other documents' answers {by_chance:.3f}"
    return ""


def _task_row(
    task: str, config: str, metric: str, own: list[float], full: list[float], why: str
) -> dict[str, Any]:
    row = {"task": task, "config": config, "metric": metric, "score": float(np.mean(own))}
    row |= dict(zip(("ratio", "low", "high"), ratio(own, full), strict=True))
    return row | {"documents": len(own), "left_out": why or None}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    use_compilation_cache()
    lm = load(args.model)
    layers = lm.attention.num_layers
    configs = {name: parse(name, num_layers=layers, profile=args.profile) for name in args.configs}
    todo = list(cases(lm, args))
    if not todo:
        raise SystemExit("there is nothing to ask: --data names no document that is long enough")
    asking = Answers(
        lm,
        configs,
        most_tokens=args.prompt_tokens[1],
        # Whatever of it is asked now, so that answers can be taken from an earlier run's records.
        new_tokens=max(args.new_tokens, NEEDLE_TOKENS, RECORD_TOKENS * args.evidence_records),
        records=args.records,
        progress=Progress(),
    )
    answered, rows, tasks = [], [], []
    for case in todo:
        answered.append((case, asking.answers(case)))
        rows, tasks = summary(answered, floor=args.floor)
        documents = [_document(case, answers) for case, answers in answered]
        results.write(args.json, "accuracy", args, rows=rows, by_task=tasks, documents=documents)
    print(table(tasks, TASK_COLUMNS), end="\n\n")
    print(table(rows, COLUMNS))
    if args.plot is not None:
        draw(rows, args.plot)
    return 0


def _document(case: Case, answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What one document got; its text, and that of the answers, stay in the records."""
    score = METRICS[case.metric]
    return {
        "task": case.document.task,
        "index": case.document.index,
        "cell": case.cell,
        "context": next(iter(answers.values()))["context"],
        "scores": {name: score(one["text"], case.references) for name, one in answers.items()},
        "tokens": {name: one["tokens"] for name, one in answers.items()},
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Retention of each config with its interval."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["retention"] is not None][::-1]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    x, names = [row["retention"] for row in shown], [row["config"] for row in shown]
    error = [
        [row["retention"] - row["low"] for row in shown],
        [row["high"] - row["retention"] for row in shown],
    ]
    axes.errorbar(x, range(len(shown)), xerr=error, fmt="o", capsize=3)
    axes.axvline(1, color="0.7", zorder=0)
    axes.set_yticks(range(len(shown)), names)
    axes.set(xlabel="score, as a share of full attention's: mean over tasks, 95 %")
    figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, nargs="*", default=[], metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--records", type=Path, metavar="FILE", help="of answers")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png or .svg")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--profile", help="name or file; default: the shipped one of the model")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--documents", type=int, default=5, help="of each file")
    parser.add_argument(
        *("--prompt-tokens",),
        type=int,
        nargs=2,
        default=[4000, 7000],
        metavar=("LEAST", "MOST"),
        help="shorter documents are passed over, longer ones cut",
    )
    parser.add_argument("--new-tokens", type=int, default=128, help="of an answer, at most")
    parser.add_argument("--needle-tokens", type=int, nargs="*", default=[2048, 4096, 6144])
    parser.add_argument("--needle-depths", type=float, nargs="*", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--needle-numbers", type=int, nargs="*", default=[1, 4], help="at most 10")
    parser.add_argument("--evidence", type=int, default=3, help="lists of records")
    parser.add_argument("--evidence-tokens", type=int, default=4096, help="of a list, about")
    parser.add_argument("--evidence-records", type=int, default=16, help="at most 26")
    parser.add_argument("--floor", type=float, default=0.1, help="of what full can do, a score")
    parser.add_argument("--seed", type=int, default=0, help="of what is generated")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser


if __name__ == "__main__":
    sys.exit(main())
