"""How `bench.accuracy` scores answers, and what a cache method keeps of full attention's scores."""

from __future__ import annotations

import functools
import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_DRAWS = 10_000
_NOTHING = (float("nan"), float("nan"), float("nan"))


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of stemmed words; the best reference counts.

    As L-Eval and SCROLLS take it from Google's rouge-score: (Lin 2004), 0 to 1.
    """
    scorer = _scorer()
    return max(scorer.score(right, answer)["rougeL"].fmeasure for right in references)


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of words without case, punctuation and articles; the best reference counts.

    As SQuAD has it (Rajpurkar et al. 2016), 0 to 1.
    """
    return max(_f1(_words(answer), _words(right)) for right in references)


def found(answer: str, references: Sequence[str]) -> float:
    """1 where the answer holds a reference as words of its own, else 0."""
    held = any(re.search(rf"(?<!\w){re.escape(right)}(?!\w)", answer) for right in references)
    return float(held)


def records_found(answer: str, references: Sequence[str]) -> float:
    """Share of the records "name: number" that stand in the answer as JSON objects.

    A list that breaks off counts as far as it goes.
    """
    said = set()
    for text in re.findall(r"\{[^{}]*\}", answer):
        try:
            record = json.loads(text)
        except ValueError:
            continue
        said.add(f"{record.get('name')}: {record.get('coins')}")
    return len(said.intersection(references)) / len(references)


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "rouge_l": rouge_l,
    "f1": token_f1,
    "found": found,
    "records": records_found,
}


def chance(
    answers: Sequence[str], references: Sequence[Sequence[str]], metric: str
) -> float | None:
    """What answers score against the references of other documents: what any text gets.

    None for a single document.
    """
    score = METRICS[metric]
    others = [
        score(answer, right)
        for at, answer in enumerate(answers)
        for of, right in enumerate(references)
        if of != at
    ]
    return float(np.mean(others)) if others else None


def ratio(scores: Sequence[float], full: Sequence[float]) -> tuple[float, float, float]:
    """Of one task: (mean score over full's, and its 95 % interval), see `retention`."""
    return retention({"": scores}, {"": full})


def retention(
    scores: Mapping[str, Sequence[float]], full: Mapping[str, Sequence[float]]
) -> tuple[float, float, float]:
    """(mean over tasks of mean score / full's mean score, and its 95 % interval).

    scores, full: by task, in one order of documents. The interval resamples each task's documents,
    both scores of a document kept together, ten thousand times with a fixed seed; draws in which
    full attention scores nothing in a task say nothing of it. NaN where a task of full has only
    zeros, or there is no task.
    """
    if not scores:
        return _NOTHING
    draw, ratios, drawn = np.random.default_rng(0), [], []
    for task, mine in scores.items():
        own, base = np.asarray(mine, np.float64), np.asarray(full[task], np.float64)
        if own.shape != base.shape or not own.size:
            raise ValueError(f"{task!r} has {own.size} scores, full attention {base.size}")
        picks = draw.integers(0, own.size, (_DRAWS, own.size))
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios.append(own.mean() / base.mean())
            found = own[picks].mean(1) / base[picks].mean(1)
        drawn.append(np.where(base[picks].mean(1) > 0, found, np.nan))
    if not np.isfinite(ratios).all():
        return _NOTHING
    means = np.mean(drawn, axis=0)
    low, high = np.nanquantile(means, (0.025, 0.975))
    return float(np.mean(ratios)), float(low), float(high)


@functools.cache
def _scorer():
    """Raises ImportError where the `bench` extra is not installed."""
    from rouge_score import rouge_scorer  # pyright: ignore[reportMissingImports]

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    shared = sum((Counter(ours) & Counter(theirs)).values())
    total = len(ours) + len(theirs)
    return 2 * shared / total if total else 0.0
