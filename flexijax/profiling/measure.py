"""Measures on real text which KV heads of a model are unstable, and makes the profile of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexijax.models.language_model import LanguageModel
from flexijax.profiles import stability
from flexijax.profiles.documents import Document, Tokenizer, prompt_ids
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.records import Records
from flexijax.profiling.recorder import SCORES, Recording, record

LAGS = (1, 2, 4, 8, 12, 16, 24, 32, 48)
# A prompt must hold this many times the budget before its heads are told apart. The 22 heads of
# SmolLM2 found on one document share 0.45 to 0.95 with those found on the other tasks, 0.77 on
# average (chance: 0.24), and no less at 1.5 times the budget, the least measured, than at 10 times.
CHOICE = 1.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure.

    page_size: tokens in a page. budgets: pages a head chooses, ascending, several at once. window:
    steps over which a head is called stable or not. fraction: share of all heads to call unstable.
    steps: decode steps a document, a multiple of 16. max_tokens: longest prompt. score: what ranks
    the pages, see `recorder.record`. Raises ValueError naming the field.

    By min/max whatever the run will choose by: of SmolLM2, lists found by "sketch2" agree better
    between tasks (0.86 against 0.82) and yet serve a run that chooses by "sketch2" worse, a
    divergence of 0.027 nats from full attention against 0.015 over 30 documents.
    """

    page_size: int = 16
    budgets: tuple[int, ...] = (64,)
    window: int = 16
    fraction: float = 0.25
    steps: int = 64
    max_tokens: int = 5000
    score: str = "minmax"

    def __post_init__(self) -> None:
        for name in ("page_size", "window", "steps", "max_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not self.budgets or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets={self.budgets} must be ascending numbers of pages")
        if self.budgets[0] < 2:
            raise ValueError(f"budgets={self.budgets} must each be at least 2 pages")
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must be between 0 and 1")
        if not 2 <= self.window <= self.steps:
            raise ValueError(f"window={self.window} must be 2 .. steps={self.steps}")
        if self.steps % 16:
            raise ValueError(f"steps={self.steps} must be a multiple of 16")
        if self.score not in SCORES:
            raise ValueError(f"score={self.score!r} must be one of {', '.join(map(repr, SCORES))}")
        if self.max_tokens <= self.budgets[0] * self.page_size:
            raise ValueError(
                f"max_tokens={self.max_tokens} must be more than the budget of {self.budgets[0]} "
                f"pages of {self.page_size} tokens, else there is nothing to choose"
            )


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is kept of one document at one budget; NaN where nothing was defined.

    instability: float[windows, L, K]. curve: mean RCO at offset 1, 2, ... from a window's first
    step, float[window - 1, L, K]. lags: mean RCO at each of `LAGS`, float[lags, L, K]. mass: mean
    share of the attention in the chosen pages, float[L, K]. undefined: pairs of steps left out.
    """

    instability: np.ndarray
    curve: np.ndarray
    lags: np.ndarray
    mass: np.ndarray
    undefined: int


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """The statistics of one document at every budget.

    tokens: of its prompt; pages: mean pages of the context over the steps.
    """

    task: str
    index: int
    tokens: int
    pages: float
    at_budget: Mapping[int, Statistics]


def statistics(recording: Recording, settings: Settings) -> dict[int, Statistics]:
    """Reduces one recording to the statistics at every budget of the settings."""
    pages = jnp.asarray(recording.pages)
    num_pages = int(recording.page_ids.max()) + 1
    # Rounded up so that documents of about one length share a compilation.
    num_pages = -(-num_pages // 64) * 64
    lags = tuple(lag for lag in LAGS if lag < settings.steps)
    found = {}
    for at, budget in enumerate(settings.budgets):
        ids = jnp.asarray(recording.page_ids[..., :budget])
        overlaps = stability.overlap_counts(ids, num_pages=num_pages)
        rco = stability.random_corrected(overlaps, pages, budget=budget)
        curves = stability.window_curves(rco, window=settings.window)
        found[budget] = Statistics(
            instability=np.asarray(stability.instability(curves)),
            curve=np.asarray(stability.offset_means(curves)),
            lags=np.asarray(stability.lag_means(rco, lags=lags)),
            mass=recording.mass[..., at].mean(axis=0),
            undefined=stability.undefined_pairs(recording.pages, budget=budget),
        )
    return found


def measure_documents(
    lm: LanguageModel,
    documents: Sequence[Document],
    settings: Settings,
    *,
    records: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[DocumentRecord]:
    """Records every document and keeps its statistics; memory does not grow with their number.

    records: a file to which each finished document is added as a JSON line; documents that it
    already holds, of the same model, text and settings, are not measured again. progress: called
    with (documents done, of how many, what is at hand). Raises ValueError when the model has no
    tokenizer.
    """
    tokenizer = _tokenizer(lm)
    known, result = Records(records), []
    for done, document in enumerate(documents):
        key: list[Any] = [lm.fingerprint, lm.name, asdict(settings)]
        key += [document.task, document.text, document.instruction]
        if progress is not None:
            progress(done, len(documents), f"{document.task}[{document.index}]")
        found = known.get(*key)
        if found is None:
            tokens = prompt_ids(document, tokenizer, max_tokens=settings.max_tokens)
            found = _to_json(measure_prompt(lm, tokens, settings, document=document))
            known.add(*key, value=found)
        # The result is always what the file says, so that resuming changes no digit.
        result.append(_from_json(found))
    if progress is not None:
        progress(len(documents), len(documents), "done")
    return result


def measure_prompt(
    lm: LanguageModel,
    tokens: list[int],
    settings: Settings,
    *,
    document: Document | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DocumentRecord:
    """Records one prompt of token ids; document only names it in the result.

    progress: called with (tokens done, of how many).
    """
    recording = record_prompt(lm, tokens, settings, progress=progress)
    return reduced(recording, len(tokens), settings, document=document)


def record_prompt(
    lm: LanguageModel,
    tokens: list[int],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """What the heads choose after a prompt; those of one `max_tokens` share one compilation."""
    return record(
        lm,
        tokens,
        steps=settings.steps,
        page_size=settings.page_size,
        budgets=settings.budgets,
        capacity=max(len(tokens), min(settings.max_tokens, lm.max_context - settings.steps))
        + settings.steps,
        score=settings.score,
        progress=progress,
    )


def reduced(
    recording: Recording, tokens: int, settings: Settings, *, document: Document | None = None
) -> DocumentRecord:
    """The statistics of a recording of a prompt of `tokens` tokens."""
    return DocumentRecord(
        task=document.task if document is not None else "prompt",
        index=document.index if document is not None else 0,
        tokens=tokens,
        pages=float(recording.pages.mean()),
        at_budget=statistics(recording, settings),
    )


def unstable_count(lm: LanguageModel, settings: Settings) -> int:
    """How many heads are called unstable: the fraction of all, rounded down, at least one."""
    heads = lm.attention.num_layers * lm.attention.num_kv_heads
    return max(1, int(heads * settings.fraction))


def make_profile(
    lm: LanguageModel, records: Sequence[DocumentRecord], settings: Settings, *, budget: int
) -> HeadProfile:
    """The profile of the records at one budget: a consensus in which every task weighs the same."""
    tasks: dict[str, list[DocumentRecord]] = {}
    for entry in records:
        tasks.setdefault(entry.task, []).append(entry)
    count = unstable_count(lm, settings)
    windows = {
        task: [entry.at_budget[budget].instability for entry in entries]
        for task, entries in tasks.items()
    }
    places = {task: stability.consensus(found) for task, found in windows.items()}
    lists = {task: stability.least_stable(found, count) for task, found in places.items()}
    matrix = stability.cross_overlap(lists)
    pairs = [matrix[a][b] for a in matrix for b in matrix if a < b]
    recall = stability.split_half_recall(windows, count=count)
    at_lag = averages(records, settings, budget=budget).lags
    rco = np.mean([_nanmean([1 - w for w in found]) for found in windows.values()], axis=0)
    names = ", ".join(f"{task} ({len(entries)})" for task, entries in tasks.items())
    measured = {
        **asdict(settings),
        "documents": {task: len(entries) for task, entries in tasks.items()},
        "prompt_tokens": {task: [entry.tokens for entry in found] for task, found in tasks.items()},
        "undefined_pairs": sum(entry.at_budget[budget].undefined for entry in records),
        "unstable_by_task": lists,
        "cross_task_overlap": _rounded(matrix),
        "mean_cross_task_overlap": _rounded(float(np.mean(pairs)) if pairs else None),
        "least_cross_task_overlap": _rounded(min(pairs, default=None)),
        "split_half_recall": _rounded(recall),
        "rco_at_lag": {str(lag): _rounded(found) for lag, found in at_lag.items()},
        "mean_attention_mass": _rounded(
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
        rco=_rounded(rco),
        measured=measured,
    )


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Means over the documents of each task, then over tasks, at one budget, for pictures.

    curve: RCO against offset from a window's first step, float[window - 1, L, K]. lags: RCO at each
    of `LAGS` below the steps, float[lags, L, K]. mass: attention held, float[L, K]. pages: of the
    context. budget: pages that a head chooses; page_size: tokens in a page.
    """

    curve: np.ndarray
    lags: dict[int, np.ndarray]
    mass: np.ndarray
    pages: float
    budget: int
    page_size: int


def averages(records: Sequence[DocumentRecord], settings: Settings, *, budget: int) -> Averages:
    """The records of one budget as one picture, every task weighing the same."""
    tasks = sorted({entry.task for entry in records})

    def mean(name: str) -> np.ndarray:
        of_task = [
            np.mean([getattr(e.at_budget[budget], name) for e in records if e.task == task], axis=0)
            for task in tasks
        ]
        return np.mean(of_task, axis=0)

    used = (lag for lag in LAGS if lag < settings.steps)
    return Averages(
        curve=mean("curve"),
        lags=dict(zip(used, mean("lags"), strict=True)),
        mass=mean("mass"),
        pages=float(np.mean([entry.pages for entry in records])),
        budget=budget,
        page_size=settings.page_size,
    )


def least_tokens(*, page_size: int, budget_pages: int) -> int:
    """The fewest tokens of a prompt that says something about the choice of `budget_pages`."""
    return math.ceil(CHOICE * budget_pages) * page_size


def profile_prompt(
    lm: LanguageModel,
    tokens: list[int],
    *,
    page_size: int,
    budget_pages: int,
    steps: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> HeadProfile:
    """A profile from nothing but one prompt, for a model that nobody has profiled.

    tokens: the prompt's ids, at least `least_tokens` of them, with room for `steps` more in the
    model's context. progress: called with (tokens done, of how many). Raises ValueError when they
    are too few to say anything.
    """
    least = least_tokens(page_size=page_size, budget_pages=budget_pages)
    if len(tokens) < least:
        raise ValueError(
            f"a prompt of {len(tokens)} tokens says nothing about the choice of {budget_pages} "
            f"pages of {page_size} tokens; it must have at least {least}"
        )
    settings = Settings(
        page_size=page_size, budgets=(budget_pages,), steps=steps, max_tokens=len(tokens)
    )
    entry = measure_prompt(lm, tokens, settings, progress=progress)
    return make_profile(lm, [entry], settings, budget=budget_pages)


def _tokenizer(lm: LanguageModel) -> Tokenizer:
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer, so it cannot read documents")
    return lm.tokenizer


def _nanmean(windows: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the documents' windows that are defined: float[L, K]."""
    stacked = np.concatenate(windows)
    return stacked[np.isfinite(stacked).all(axis=(1, 2))].mean(axis=0)


def _to_json(entry: DocumentRecord) -> dict[str, Any]:
    at_budget = {
        str(budget): {name: _rounded(value) for name, value in asdict(found).items()}
        for budget, found in entry.at_budget.items()
    }
    return {**asdict(entry), "at_budget": at_budget}


def _from_json(fields: Mapping[str, Any]) -> DocumentRecord:
    at_budget = {
        int(budget): Statistics(
            undefined=found["undefined"],
            # None becomes NaN.
            **{
                name: np.array(value, np.float64)
                for name, value in found.items()
                if name != "undefined"
            },
        )
        for budget, found in fields["at_budget"].items()
    }
    return DocumentRecord(**{**fields, "at_budget": at_budget})


def _rounded(value):
    """Plain JSON values with four decimals: arrays as nested tuples, NaN as None."""
    if isinstance(value, np.ndarray):
        return _rounded(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(_rounded(item) for item in value)
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if np.isfinite(value) else None
    return value
