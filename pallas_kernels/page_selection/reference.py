"""The oracle of page selection, in float64 NumPy."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def page_ranks(scores: ArrayLike) -> Array:
    """What the pages of one KV head rank by: scores [G, P] -> [P], -inf where none has a score.

    One score is the rank. Several are logs of attention mass, and the rank is the log of the mean
    over the query heads of the page's share.
    """
    scores = np.asarray(scores, np.float64)
    if len(scores) == 1:
        return scores[0]
    with np.errstate(divide="ignore"):
        shares = [log - _log_sum(log) if np.isfinite(log).any() else log for log in scores]
        return np.array([_log_sum(page) for page in np.transpose(shares)]) - np.log(len(scores))


def _log_sum(logs: Array) -> float:
    finite = logs[np.isfinite(logs)]
    if not len(finite):
        return -np.inf
    return finite.max() + np.log(np.exp(finite - finite.max()).sum())


def select_pages(
    scores: ArrayLike,
    lengths: ArrayLike,
    scored: ArrayLike,
    *,
    count: int,
    newer: int,
    page_size: int,
    sinks: int,
) -> list[list[set[int]]]:
    """The chosen pages of every request and head, as sets; see `dispatch.select_pages`."""
    chosen = []
    rows = zip(np.asarray(scores), np.asarray(lengths), np.asarray(scored), strict=True)
    for of_request, length, known in rows:
        begun = -(-int(length) // page_size)
        tail = min(int(known) // page_size, begun - 1)
        always = {page for page in range(begun) if page < sinks or page >= tail}
        room = count + min(newer, max(0, begun - 1 - tail))
        chosen.append([_best(page_ranks(head), begun, always, room) for head in of_request])
    return chosen


def _best(ranks: Array, begun: int, always: set[int], room: int) -> set[int]:
    pages = sorted(range(begun), key=lambda page: (page not in always, -ranks[page], page))
    return {page for page in pages[:room] if page in always or ranks[page] > -np.inf}
