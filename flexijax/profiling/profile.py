"""The profile of a model, from the statistics of documents."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from flexijax.models.language_model import LanguageModel
from flexijax.profiles import stability
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.lost_mass import most_lost_first, window_mean
from flexijax.profiling.settings import LOST_MASS, Settings
from flexijax.profiling.statistics import DocumentRecord, averages, rounded


def unstable_count(lm: LanguageModel, settings: Settings) -> int:
    """How many heads are called unstable: the fraction of all, rounded down, at least one."""
    heads = lm.attention.num_layers * lm.attention.num_kv_heads
    return max(1, int(heads * settings.fraction))


def make_profile(
    lm: LanguageModel, records: Sequence[DocumentRecord], settings: Settings, *, budget: int
) -> HeadProfile:
    """The profile of the records at one budget, in which every task weighs the same.

    By lost mass, unstable are the heads with the greatest mean; by RCO, a consensus of ranks.
    """
    tasks: dict[str, list[DocumentRecord]] = {}
    for entry in records:
        tasks.setdefault(entry.task, []).append(entry)
    count = unstable_count(lm, settings)
    losses, instability = (
        {task: [getattr(e.at_budget[budget], name) for e in found] for task, found in tasks.items()}
        for name in ("lost", "instability")
    )
    if settings.unstable_by == LOST_MASS:
        windows, order = losses, most_lost_first
    else:
        windows, order = instability, stability.consensus
    places = {task: order(found) for task, found in windows.items()}
    lists = {task: stability.least_stable(found, count) for task, found in places.items()}
    matrix = stability.cross_overlap(lists)
    pairs = [matrix[a][b] for a in matrix for b in matrix if a < b]
    recall = stability.split_half_recall(windows, order, count=count)
    at_lag = averages(records, settings, budget=budget).lags
    names = ", ".join(f"{task} ({len(entries)})" for task, entries in tasks.items())
    measured = {
        **asdict(settings),
        "documents": {task: len(entries) for task, entries in tasks.items()},
        "document_indices": {task: [e.index for e in entries] for task, entries in tasks.items()},
        "prompt_tokens": {task: [entry.tokens for entry in found] for task, found in tasks.items()},
        "undefined_pairs": sum(entry.at_budget[budget].undefined for entry in records),
        "unstable_by_task": lists,
        "cross_task_overlap": rounded(matrix),
        "mean_cross_task_overlap": rounded(float(np.mean(pairs)) if pairs else None),
        "least_cross_task_overlap": rounded(min(pairs, default=None)),
        "split_half_recall": rounded(recall),
        "rco_at_lag": {str(lag): rounded(found) for lag, found in at_lag.items()},
        "mean_attention_mass": rounded(
            float(np.mean([entry.at_budget[budget].mass.mean() for entry in records]))
        ),
    }
    return HeadProfile(
        model=lm.name,
        num_layers=lm.attention.num_layers,
        num_kv_heads=lm.attention.num_kv_heads,
        unstable=stability.least_stable(np.mean(list(places.values()), axis=0), count),
        page_size=settings.page_size,
        budget_pages=budget,
        source=f"measured by flexijax profile on {names}, documents each",
        fingerprint=lm.fingerprint,
        rco=rounded(np.mean([1 - window_mean(found) for found in instability.values()], axis=0)),
        lost_mass=rounded(np.mean([window_mean(found) for found in losses.values()], axis=0)),
        measured=measured,
    )
