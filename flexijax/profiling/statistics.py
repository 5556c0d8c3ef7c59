"""What is kept of a recorded document, as arrays and as JSON, and means over documents."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexijax.profiles import stability
from flexijax.profiles.averages import Averages
from flexijax.profiles.lost_mass import window_losses
from flexijax.profiling.record import RecordedChoices
from flexijax.profiling.settings import Settings

LAGS = (1, 2, 4, 8, 12, 16, 24, 32, 48)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is kept of one document at one budget; NaN where nothing was defined.

    instability, lost: float[windows, L, K], see `profiles.stability` and `profiles.lost_mass`.
    curve: mean RCO at offset 1, 2, ... from a window's first step, float[window - 1, L, K]. lags:
    mean RCO at each of `LAGS`, float[lags, L, K]. mass: mean share of the attention in the chosen
    pages, float[L, K]. undefined: pairs of steps left out.
    """

    instability: np.ndarray
    lost: np.ndarray
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


def statistics(recording: RecordedChoices, settings: Settings) -> dict[int, Statistics]:
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
            lost=window_losses(
                recording.mass[..., at],
                recording.stale_mass[..., at],
                recording.pages,
                budget=budget,
                window=settings.window,
            ),
            curve=np.asarray(stability.offset_means(curves)),
            lags=np.asarray(stability.lag_means(rco, lags=lags)),
            mass=recording.mass[..., at].mean(axis=0),
            undefined=stability.undefined_pairs(recording.pages, budget=budget),
        )
    return found


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


def to_json(entry: DocumentRecord) -> dict[str, Any]:
    at_budget = {
        str(budget): {name: rounded(value) for name, value in asdict(found).items()}
        for budget, found in entry.at_budget.items()
    }
    return {**asdict(entry), "at_budget": at_budget}


def from_json(fields: Mapping[str, Any]) -> DocumentRecord:
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


def rounded(value):
    """Plain JSON values with four decimals: arrays as nested tuples, NaN as None."""
    if isinstance(value, np.ndarray):
        return rounded(value.tolist())
    if isinstance(value, list | tuple):
        return tuple(rounded(item) for item in value)
    if isinstance(value, Mapping):
        return {name: rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return round(value, 4) if np.isfinite(value) else None
    return value
