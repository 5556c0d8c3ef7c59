"""How much attention a head loses by an old choice of pages: its lost mass.

At step t a head gives page p the share a_t(p) of its attention, mean over the query heads of the KV
head. S_t are the n pages that it chooses then, and T_t those that began in the R = 16 steps before:
after a rerank they are attended by rule. A rerank every R steps makes a head attend to old choices
of up to that age, and at the oldest it loses

    lost(t) = sum of a_t over S_t  -  sum of a_t over S_(t-R) and T_t

0 where the old choice is as good as a new one, however different its pages are. Pages are chosen as
a run chooses them; the attention is exact.
"""

from collections.abc import Sequence

import numpy as np


def window_losses(
    mass: np.ndarray, stale_mass: np.ndarray, pages: np.ndarray, *, budget: int, window: int
) -> np.ndarray:
    """Mean lost mass of each window: float64[windows, L, K], NaN where nothing is defined.

    mass, stale_mass: float[T, L, K], of S_t and of S_(t-R) and T_t; the latter NaN where no choice
    was so old. pages: int[T], pages at each step. budget: pages a head chooses (n); with no more
    pages than that there is nothing to choose, and the step is left out. Windows are steps
    0 .. window-1, window .. 2*window-1 and so on; an unfinished last one is left out.
    """
    lost = mass.astype(np.float64) - stale_mass
    lost[pages <= budget] = np.nan
    whole = len(lost) // window * window
    windows = lost[:whole].reshape(-1, window, *lost.shape[1:])
    defined = np.isfinite(windows)
    total = np.where(defined, windows, 0.0).sum(axis=1)
    count = defined.sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def window_mean(windows_of_documents: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the windows that are defined, of all documents: float[L, K].

    windows_of_documents: float[windows, L, K] of each. Raises ValueError when nothing is left.
    """
    windows = np.concatenate(windows_of_documents)
    windows = windows[np.isfinite(windows).all(axis=(1, 2))]
    if not len(windows):
        raise ValueError("nothing to average: no window had more pages than the budget")
    return windows.mean(axis=0)


def most_lost_first(windows_of_documents: Sequence[np.ndarray]) -> np.ndarray:
    """What heads are ordered by, the smallest first: float[L, K], less the mean lost mass.

    The values themselves are averaged, since they say what a head costs. Lists of SmolLM2's heads
    from halves of ten documents share 0.95 by values, and 0.86 by their ranks.
    """
    return -window_mean(windows_of_documents)
