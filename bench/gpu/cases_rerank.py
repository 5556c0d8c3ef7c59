"""Kernels that a rerank runs: sketches of pages that filled up, and the plan."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from bench.gpu.cases import (
    BITS,
    NUMBERS,
    Case,
    chosen_pages,
    exact,
    keys,
    on_device,
    updates,
)
from bench.gpu.data import DISTINCT, block_table, changed_pages, number_error, sources, spread
from bench.gpu.sizes import Sizes
from flexijax.pallas_kernels import dispatch_rerank, sketches
from flexijax.pallas_kernels.rerank import Reranked, RerankStats
from flexijax.pallas_kernels.rerank_plan import reference as plan_reference
from flexijax.pallas_kernels.sketch_scores.reference import sketch_levels, sketch_unpack
from flexijax.pallas_kernels.sketches import SPACING, SketchCode

# Pages of a head that fill up in a chunk of steps.
_ENTRIES = 2
# Levels that float32 may round to the other side of an edge.
_LEVELS = 1 / 2000
# Pages of heads whose levels are looked at.
_SAMPLE = 24


def paged_encode(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Codes of pages of a pool, of which all that is not named is NaN."""
    block = _blocks(rng, lengths, blocks)
    block[np.arange(len(lengths)) % 5 == 3, 0] = -1
    b, e = np.nonzero(block >= 0)
    source, named = sources(rng, blocks, sizes.heads), np.zeros((blocks, sizes.heads), np.int32)
    named[block[b, e]] = sizes.page
    base = keys(sizes, rng)
    rows = [
        (row, h, block[row, entry], base[source[block[row, entry], h]])
        for row, entry in zip(b, e, strict=True)
        for h in range(sizes.heads)
    ]
    args = (on_device(block), spread(base, source, named))
    return _encode(sizes, rng, _paged_encode, args, rows, blocks=blocks, batch=len(lengths))


def slot_encode(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Codes of pages in the slots of those heads that hold them; all other slots are NaN."""
    newest = lengths[:, None] // sizes.page - 1 - np.arange(_ENTRIES)
    page = np.where(newest >= 0, newest, -1).astype(np.int32)
    block = np.where(page >= 0, _blocks(rng, lengths, blocks), -1)
    slot_page = chosen_pages(
        rng, sizes, lengths, heads=sizes.heads, room=sizes.slots, newest=_ENTRIES + 1
    )
    slot_page[rng.random(slot_page.shape) < 0.1] = -1
    base, source = keys(sizes, rng), sources(rng, *slot_page.shape)
    filled = (slot_page[..., None] == page[:, None, None]) & (slot_page >= 0)[..., None]
    k = spread(base, source, sizes.page * filled.any(-1).astype(np.int32))
    rows = [
        (b, h, block[b, e], base[source[b, h, s]])
        for b, h, s, e in zip(*np.nonzero(filled), strict=True)
    ]
    k = jax.jit(lambda k: k.transpose(0, 1, 4, 2, 3))(k)
    args = (*on_device((page, block, slot_page)), k)
    return _encode(sizes, rng, _slot_encode, args, rows, blocks=blocks, batch=len(lengths))


def _blocks(rng: np.random.Generator, lengths: np.ndarray, blocks: int) -> np.ndarray:
    """int32[B, E], no block twice, the pool's last among them; -1 for a request without tokens."""
    block = rng.choice(blocks - 1, (len(lengths), _ENTRIES), replace=False).astype(np.int32)
    block[0, -1] = blocks - 1
    return np.where(lengths[:, None] > 0, block, -1)


def _encode(
    sizes: Sizes,
    rng: np.random.Generator,
    function: Any,
    args: tuple[Any, ...],
    rows: list[Any],
    *,
    blocks: int,
    batch: int,
) -> Case:
    """rows: (request, head, block, keys [page, H]) of each page whose codes are to be written."""
    base = rng.integers(
        0, 2**32, (DISTINCT, BITS, sketches.words(sizes.width), sizes.page), dtype=np.uint32
    )
    source, of = sources(rng, blocks, sizes.heads), (batch, sizes.heads, sizes.width)
    mean = rng.normal(size=of, scale=0.5).astype(np.float32)
    step = (2 * SPACING[BITS] * rng.uniform(0.7, 1.3, of)).astype(np.float32)

    def error(_: object, codes: jax.Array) -> float:
        written = np.zeros((blocks, sizes.heads), bool)
        written[[row[2] for row in rows], [row[1] for row in rows]] = True
        right = np.array_equal(changed_pages(codes, base, source), written)
        looked = [rows[at] for at in rng.permutation(len(rows))[:_SAMPLE]]
        at = tuple(np.array([(row[2], row[1]) for row in looked]).T)
        found = sketch_unpack(np.asarray(codes[at]), sizes.width)
        apart = [
            np.abs(levels - sketch_levels(k, mean[b, h], step[b, h], bits=BITS))
            for levels, (b, h, _, k) in zip(found, looked, strict=True)
        ]
        return max(exact(right, np.max(apart) <= 1), float(np.mean(apart)))

    code = SketchCode(*on_device((mean, step)))
    page_bytes = rows[0][3].nbytes + base[0].nbytes
    return Case(
        updates(function),
        spread(base, source),
        (*args, code),
        error,
        _LEVELS,
        len(rows) * page_bytes + 2 * mean.nbytes,
    )


def _paged_encode(codes: Any, block: Any, k_pages: Any, code: SketchCode) -> Any:
    return (), dispatch_rerank.paged_encode(codes, code, k_pages, block)


def _slot_encode(
    codes: Any, page: Any, block: Any, slot_page: Any, k_slots: Any, code: SketchCode
) -> Any:
    return (), dispatch_rerank.slot_encode(codes, code, k_slots, slot_page, page, block)


def rerank(sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int) -> Case:
    """A plan of all heads, some of them not due, against lists and sets."""
    heads, page = (len(lengths), sizes.heads), sizes.page
    table = block_table(rng, lengths, blocks=blocks, pages=sizes.pages, page=page)
    chosen = chosen_pages(rng, sizes, lengths, heads=sizes.heads, room=sizes.budget_pages)
    before = np.maximum(lengths - rng.integers(0, 2 * page, heads[0]), 0)
    # Half of what is chosen was so before.
    slot_page = chosen_pages(rng, sizes, before, heads=sizes.heads, room=sizes.slots)
    stays = rng.random(chosen.shape) < 0.5
    kept = np.where(stays, chosen, -1)
    slot_page[(slot_page[..., None] == kept[:, :, None]).any(-1)] = -1
    slot_page[..., :-1] = np.where(kept >= 0, kept, slot_page[..., :-1])
    due = ((rng.random(heads) < 0.8) & (lengths > 0)[:, None]).astype(np.int32)
    since = np.repeat(before[:, None], heads[1], axis=1)
    filled = np.where(lengths > 0, lengths // page - 1, -1)[:, None]
    plan = chosen, *(x.astype(np.int32) for x in (lengths, since, due, table, filled))
    counts = {
        name: rng.integers(0, 50, heads).astype(_dtype(name)) for name in plan_reference.STATS
    }
    stats = RerankStats(**on_device(counts))

    def error(made: tuple[jax.Array, jax.Array], state: tuple[jax.Array, RerankStats]) -> float:
        slots, load, rco, expected = plan_reference.rerank(
            chosen, slot_page, *plan[1:], stats=counts, page_size=page
        )
        known = (due > 0) & ~np.isnan(rco)
        found = np.asarray(made[1])
        right = np.array_equal(state[0], slots), np.array_equal(made[0], load)
        return max(
            exact(*right, bool(np.isnan(found[(due > 0) & np.isnan(rco)]).all())),
            number_error(found[known], rco[known]),
            *(number_error(getattr(state[1], name), expected[name]) for name in expected),
        )

    args = on_device(plan)
    moved = sum(x.nbytes for x in plan) + 3 * slot_page.nbytes + 2 * len(counts) * due.nbytes
    function = updates(_rerank, page_size=page)
    return Case(function, (on_device(slot_page), stats), args, error, NUMBERS, moved)


def _dtype(name: str) -> str:
    return "float32" if name in ("overlap", "rco") else "int32"


def _rerank(state: Any, chosen: Any, *plan: Any, page_size: int) -> Any:
    slot_page, stats = state
    made: Reranked = dispatch_rerank.rerank(
        chosen, slot_page, *plan, stats=stats, page_size=page_size
    )
    return (made.load, made.rco), (made.slot_page, made.stats)
