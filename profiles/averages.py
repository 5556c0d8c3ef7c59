"""Means over documents, for pictures."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Averages:
    """Means over the documents of each task, then over tasks, at one budget, for pictures.

    curve: RCO against offset from a window's first step, float[window - 1, L, K]. lags: RCO at
    each lag, float[lags, L, K]. mass: attention held, float[L, K]. pages: of the
    context. budget: pages that a head chooses; page_size: tokens in a page.
    """

    curve: np.ndarray
    lags: dict[int, np.ndarray]
    mass: np.ndarray
    pages: float
    budget: int
    page_size: int
