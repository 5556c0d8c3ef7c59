"""The oracle of the scheduler step, with lists and sets, head after head."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

STATS = ("reranks", "overlap", "rco", "choices", "promoted", "offloaded")


def plan_head(
    chosen: list[int], slots: list[int], length: int, since: int, *, pages: int, page_size: int
) -> tuple[list[int], list[int], float, float]:
    """Of one head: (slots afterwards, page to load into each or -1, overlap, RCO or NaN).

    Chosen pages that are resident stay where they are. The others come into what is free, and
    behind them the pages that begin next, all in ascending order.
    """
    wanted = {page for page in chosen if page >= 0}
    begun = -(-length // page_size)
    resident = {page for page in slots if 0 <= page < begun}
    stays = [page in wanted and page in resident for page in slots]
    missing = sorted(wanted - resident)
    coming = missing + (list(range(begun, pages)) if length else [])
    after, load = [], []
    for page, kept in zip(slots, stays, strict=True):
        new = page if kept else coming.pop(0) if coming else -1
        after.append(new)
        load.append(new if not kept and new in missing else -1)
    overlap = len(wanted & resident) / max(len(wanted), 1)
    again = len({page for page in wanted & resident if page * page_size < since})
    rco = np.nan
    if wanted and len(wanted) < begun:
        chance = len(wanted) / begun
        rco = (again / len(wanted) - chance) / (1 - chance)
    return after, load, overlap, rco


def rerank(
    chosen: ArrayLike,
    slot_page: ArrayLike,
    lengths: ArrayLike,
    since: ArrayLike,
    due: ArrayLike,
    block_table: ArrayLike,
    filled_page: ArrayLike,
    stats: Mapping[str, ArrayLike],
    *,
    page_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], dict[str, NDArray]]:
    """(slot_page, load, rco, stats) of all heads; arrays as `dispatch_rerank.rerank`, which see."""
    chosen, slots, table = (
        np.asarray(chosen),
        np.array(slot_page, np.int64),
        np.asarray(block_table),
    )
    heads = chosen.shape[:2]
    since, due = np.broadcast_to(since, heads), np.broadcast_to(due, heads)
    load, rco = np.full(slots.shape, -1, np.int64), np.full(heads, np.nan)
    counts = {name: np.array(stats[name], np.float64) for name in STATS}
    for b, h in np.ndindex(*heads):
        before = slots[b, h].tolist()
        counts["offloaded"][b, h] += sum(p in before for p in np.asarray(filled_page)[b] if p >= 0)
        if due[b, h] <= 0:
            continue
        after, pages, overlap, rco[b, h] = plan_head(
            chosen[b, h].tolist(),
            before,
            int(np.asarray(lengths)[b]),
            int(since[b, h]),
            pages=table.shape[1],
            page_size=page_size,
        )
        slots[b, h] = after
        load[b, h] = [table[b, page] if page >= 0 else -1 for page in pages]
        counts["reranks"][b, h] += 1
        counts["overlap"][b, h] += overlap
        counts["promoted"][b, h] += sum(page >= 0 for page in pages)
        if not np.isnan(rco[b, h]):
            counts["rco"][b, h] += rco[b, h]
            counts["choices"][b, h] += 1
    return slots, load, rco, counts
