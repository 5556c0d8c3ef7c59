"""Kernels that choose pages: queries made ready, scores from what is kept of pages, the best."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.cases import (
    BITS,
    NUMBERS,
    ROWS,
    Case,
    exact,
    on_device,
    queries,
    reads,
    sample,
    scale,
)
from bench.gpu.data import DISTINCT, block_table, number_error, random_pages, sources, spread
from bench.gpu.sizes import Sizes
from flexijax.pallas_kernels import dispatch, lanes, platform, sketches
from flexijax.pallas_kernels.page_scores import reference as minmax_reference
from flexijax.pallas_kernels.page_selection import reference as selection_reference
from flexijax.pallas_kernels.sketch_query import reference as query_reference
from flexijax.pallas_kernels.sketch_scores import reference as sketch_reference
from flexijax.pallas_kernels.sketches import SketchCode, SketchQuery


def sketch_query(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Queries rotated and rounded; the codes of a request without tokens are NaN."""
    q, there = queries(sizes, rng, len(lengths)), lengths > 0
    mean, step = (x.astype(np.float32) for x in rng.normal(size=(2, *q.shape[:2], sizes.width)))
    step = np.abs(step) + np.float32(0.1)
    mean[~there] = step[~there] = np.nan
    how = {"bits": BITS, "scale": scale(sizes)}

    def error(made: SketchQuery, _: object) -> float:
        exactly, offset, unit = query_reference.sketch_query(
            q[there].astype(np.float64), mean[there], step[there], **how
        )
        found = _weights(made.weights, sizes.width)[there]
        # A weight in the middle of two may be rounded to either, and the offset goes with it.
        offset += unit * (np.round(exactly) - found).sum(-1) * (2**BITS - 1) / 2
        beyond = np.maximum(np.abs(found - exactly) - 0.5, 0) / sketches.LARGEST
        return max(
            float(beyond.max()),
            number_error(np.asarray(made.offset)[there], offset),
            number_error(np.asarray(made.unit)[there], unit),
        )

    args = (on_device(q), SketchCode(*on_device((mean, step))))
    moved = 2 * mean.nbytes + q.nbytes + q.size + 8 * q[..., 0].size
    return Case(reads(dispatch.sketch_query, **how), (), args, error, NUMBERS, moved)


def _weights(made: jax.Array, width: int) -> np.ndarray:
    """Whole numbers [B, K, G, H] of a query's weights, packed or not."""
    weights = np.asarray(made)
    if weights.dtype == np.int8:
        return weights.astype(np.float64)
    one = np.asarray(lanes.pack(jnp.ones(sketches.WORD, jnp.int8))).view(np.int8)
    of_lanes = weights[..., None].view(np.int8) / one.reshape(1, lanes.GROUPS, lanes.LANES)
    return of_lanes.swapaxes(-1, -2).reshape(*weights.shape[:-2], -1)[..., :width]


def sketch_scores(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Scores of all full pages from codes of two bits; what is no full page is garbage, or NaN."""
    batch, heads, page = len(lengths), sizes.heads, sizes.page
    table = block_table(rng, lengths, blocks=blocks, pages=sizes.pages, page=page)
    full = lengths // page
    table[np.arange(sizes.pages) >= full[:, None]] = 2**30
    shape = (BITS, sketches.words(sizes.width), page)
    base = rng.integers(0, 2**32, (DISTINCT, *shape), dtype=np.uint32)
    source, of = sources(rng, blocks, heads), (batch, heads, sizes.group)
    weights = rng.integers(-31, 32, (*of, sizes.width)).astype(np.int8)
    offset = np.where(full[:, None, None] > 0, rng.normal(size=of), np.nan).astype(np.float32)
    unit = rng.uniform(0.5, 2, of) / (20 * sizes.width**0.5 * 2**BITS)
    unit = unit.astype(np.float32)

    def error(made: jax.Array, _: object) -> float:
        scores = np.asarray(made)
        worst = [_beyond(scores, full[:, None, None, None])]
        for b in np.flatnonzero(full):
            pages = sample(rng, int(full[b]))
            expected = sketch_reference.sketch_scores(
                weights[b : b + 1],
                offset[b : b + 1],
                unit[b : b + 1],
                base[source[table[b, pages]]],
                np.arange(len(pages))[None],
                [len(pages) * page],
                page_size=page,
            )
            worst.append(number_error(scores[b][..., pages], expected[0]))
        return max(worst)

    query = SketchQuery(*on_device((weights, offset, unit)))
    if platform.is_gpu():
        # As `sketch_query` hands them on there.
        query = dataclasses.replace(query, weights=lanes.pack(query.weights))
    args = (query, spread(base, source), *on_device((table, lengths)))
    function = reads(dispatch.sketch_scores, page_size=page)
    moved = (
        int(full.sum()) * heads * base[0].nbytes + table.nbytes + 4 * table.size * np.prod(of[1:])
    )
    return Case(function, (), args, error, NUMBERS, int(moved))


def page_scores(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Scores of all pages that have begun from 16-bit minima and maxima; others are NaN."""
    batch, heads, page = len(lengths), sizes.heads, sizes.page
    table = block_table(rng, lengths, blocks=blocks, pages=sizes.pages, page=page)
    begun = -(-lengths // page)
    used = np.zeros((blocks, heads), np.int32)
    used[table[table < blocks]] = 2
    unused = int(np.argmin(used[:, 0]))
    table[table >= blocks] = unused
    base = np.sort(random_pages(rng, 2, sizes.width, dtype=sizes.dtype, scale=3), axis=1)
    source, q = sources(rng, blocks, heads), queries(sizes, rng, batch)

    def error(made: jax.Array, _: object) -> float:
        scores = np.asarray(made)
        worst = [_beyond(scores, begun[:, None, None])]
        for b in np.flatnonzero(begun):
            pages = sample(rng, int(begun[b]))
            expected = minmax_reference.page_scores(
                q[b : b + 1],
                base[source[table[b, pages]]],
                np.arange(len(pages))[None],
                [len(pages) * page],
                page_size=page,
            )
            worst.append(number_error(scores[b][..., pages], expected[0]))
        return max(worst)

    args = (on_device(q), spread(base, source, used), *on_device((table, lengths)))
    function = reads(dispatch.page_scores, page_size=page)
    moved = int(begun.sum()) * heads * base[0].nbytes + table.nbytes + 4 * table.size * heads
    return Case(function, (), args, error, ROWS, moved)


def select_pages(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """The best pages of logs of attention mass, and those that are always attended."""
    page, shape = sizes.page, (len(lengths), sizes.heads, sizes.group, sizes.pages)
    scored = np.maximum(lengths - 7, 0) // page * page
    scores = rng.normal(size=shape, scale=8).astype(np.float32)
    scores[np.broadcast_to(_from(scored // page, sizes.pages), shape)] = -np.inf
    how = {"count": sizes.budget_pages, "newer": 1, "page_size": page, "sinks": 1}

    def error(made: jax.Array, _: object) -> float:
        found = np.sort(np.asarray(made), axis=-1)
        twice = (found[..., 1:] == found[..., :-1]) & (found[..., 1:] >= 0)
        beyond = found >= -(-lengths // page)[:, None, None]
        if twice.any() or beyond.any() or (found < -1).any():
            return np.inf
        worst = []
        for b in range(len(lengths)):
            h = b % sizes.heads
            row = scores[b : b + 1, h : h + 1]
            [[wanted]] = selection_reference.select_pages(
                row, lengths[b : b + 1], scored[b : b + 1], **how
            )
            chosen = {int(p) for p in found[b, h] if p >= 0}
            ranks = selection_reference.page_ranks(row[0, 0])
            # Pages that rank as good as equal may stand for each other.
            missing, extra = (
                np.sort(ranks[np.array(sorted(some), np.int64)])
                for some in (wanted - chosen, chosen - wanted)
            )
            same = len(missing) == len(extra)
            worst.append(number_error(extra, missing) if same else np.inf)
        return max(worst)

    args = on_device((lengths, scores, scored.astype(np.int32)))
    function = reads(_select, **how)
    return Case(function, (), args, error, NUMBERS, scores.nbytes)


def _select(lengths: jax.Array, scores: jax.Array, scored: jax.Array, **how: Any) -> jax.Array:
    return dispatch.select_pages(scores, lengths, scored, **how)


def _from(page: np.ndarray, pages: int) -> np.ndarray:
    """bool[B, 1, 1, pages]: from each request's page on."""
    return np.arange(pages) >= page[:, None, None, None]


def _beyond(scores: np.ndarray, pages: np.ndarray) -> float:
    """0 where scores [..., P] are -inf from page `pages` on, and only there; else infinite."""
    right = np.isneginf(scores) == (np.arange(scores.shape[-1]) >= pages)
    return exact(bool(right.all()), not np.isnan(scores).any())
