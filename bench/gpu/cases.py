"""Arguments of the kernels that read, poisoned where they must not, and what float64 says of them.

Every oracle is asked for a sample of rows: of the whole it would take minutes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.data import (
    DISTINCT,
    block_table,
    number_error,
    random_pages,
    row_error,
    sources,
    spread,
)
from bench.gpu.sizes import Sizes
from flexijax.pallas_kernels import dispatch, platform, sketches
from flexijax.pallas_kernels.page_scores import reference as minmax_reference
from flexijax.pallas_kernels.sketch_scores import reference as sketch_reference
from flexijax.pallas_kernels.sketches import SketchQuery
from flexijax.pallas_kernels.sparse_decode import reference as decode_reference

BITS = 2
# Of a row against its norm, where keys, values and what comes out have 8 bits of mantissa; and of
# numbers that were summed in float32.
ROWS, NUMBERS = 1e-2, 1e-4
# Pages of each request that an oracle of scores is asked for.
_SAMPLE = 24


@dataclasses.dataclass(frozen=True)
class Case:
    """One call. function: through `dispatch`, jitted. args: on the device; q, or what is like
    it, first. error: of what came out. most: allowed. moved: bytes that must be read or written.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    error: Callable[[Any], float]
    most: float
    moved: int


def paged_decode(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Attention over chosen pages of a pool [blocks, K, page, H], others of each head."""
    batch, heads, page = len(lengths), sizes.heads, sizes.page
    table = block_table(rng, lengths, blocks=blocks, pages=sizes.pages, page=page)
    ids = np.full((batch, heads, sizes.budget_pages), -1, np.int32)
    counts = np.zeros(ids.shape, np.int32)
    valid = np.zeros((blocks, heads), np.int32)
    for b, h in np.ndindex(batch, heads):
        chosen = _chosen(rng, int(lengths[b]), page, sizes.budget_pages)
        ids[b, h, : len(chosen)] = table[b, chosen]
        counts[b, h, : len(chosen)] = np.clip(lengths[b] - chosen * page, 0, page)
        valid[table[b, chosen], h] = counts[b, h, : len(chosen)]
    bases = [_keys(sizes, rng), random_pages(rng, page, sizes.width, dtype=sizes.dtype, scale=1)]
    source = sources(rng, blocks, heads)
    q = _queries(sizes, rng, batch)
    pools = [spread(base, source, valid) for base in bases]

    def error(made: tuple[jax.Array, jax.Array]) -> float:
        out, lse = map(np.asarray, made)
        worst = [0.0 if np.isfinite(np.asarray(out, np.float32)).all() else np.inf]
        for b in range(batch):
            h = b % heads
            k, v = (base[source[ids[b, h], h]][:, None] for base in bases)
            place = np.where(ids[b, h] < 0, -1, np.arange(ids.shape[2]))[None, None]
            expected, expected_lse = decode_reference.paged_decode(
                q[b : b + 1, h : h + 1],
                k,
                v,
                place,
                counts[b : b + 1, h : h + 1],
                scale=_scale(sizes),
            )
            worst.append(row_error(out[b, h], expected[0, 0]))
            worst.append(number_error(lse[b, h], expected_lse[0, 0]))
        return max(worst)

    function = _jitted(dispatch.paged_decode, scale=_scale(sizes))
    moved = 2 * int(counts.sum()) * sizes.width * q.itemsize + 2 * q.nbytes
    return Case(function, (_on_device(q), *pools, *_on_device((ids, counts))), error, ROWS, moved)


def slot_decode(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """Attention over a head's own slots, k [B, K, H, S, page]. blocks: S, beside `sizes.slots`."""
    batch, heads, page, slots = len(lengths), sizes.heads, sizes.page, max(blocks, sizes.slots)
    counts = np.zeros((batch, heads, slots), np.int32)
    for b, h in np.ndindex(batch, heads):
        chosen = _chosen(rng, int(lengths[b]), page, sizes.slots)
        # The last slot is in use wherever any is.
        place = np.append(rng.permutation(slots - 1), slots - 1)[-len(chosen) or slots :]
        counts[b, h, place] = np.clip(lengths[b] - chosen * page, 0, page)
    bases = [_keys(sizes, rng), random_pages(rng, page, sizes.width, dtype=sizes.dtype, scale=1)]
    source, q = sources(rng, *counts.shape), _queries(sizes, rng, batch)
    k, v = (spread(base, source, counts) for base in bases)
    k = jax.jit(lambda k: k.transpose(0, 1, 4, 2, 3))(k)

    def error(made: tuple[jax.Array, jax.Array]) -> float:
        out, lse = map(np.asarray, made)
        worst = [0.0 if np.isfinite(np.asarray(out, np.float32)).all() else np.inf]
        for b in range(batch):
            h = b % heads
            used = np.flatnonzero(counts[b, h])
            k, v = (base[source[b, h, used]] for base in bases)
            expected, expected_lse = decode_reference.slot_decode(
                q[b : b + 1, h : h + 1],
                k.transpose(2, 0, 1)[None, None],
                v[None, None],
                counts[b, h, used][None, None],
                scale=_scale(sizes),
            )
            worst.append(row_error(out[b, h], expected[0, 0]))
            worst.append(number_error(lse[b, h], expected_lse[0, 0]))
        return max(worst)

    function = _jitted(dispatch.slot_decode, scale=_scale(sizes))
    moved = 2 * int(counts.sum()) * sizes.width * q.itemsize + 2 * q.nbytes
    return Case(function, (_on_device(q), k, v, _on_device(counts)), error, ROWS, moved)


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

    def error(made: jax.Array) -> float:
        scores = np.asarray(made)
        worst = [_beyond(scores, full[:, None, None, None])]
        for b in np.flatnonzero(full):
            pages = _sample(rng, int(full[b]))
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

    query = SketchQuery(*_on_device((weights, offset, unit)))
    args = (query, spread(base, source), *_on_device((table, lengths)))
    function = _jitted(dispatch.sketch_scores, page_size=page)
    moved = (
        int(full.sum()) * heads * base[0].nbytes + table.nbytes + 4 * table.size * np.prod(of[1:])
    )
    return Case(function, args, error, NUMBERS, int(moved))


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
    source, q = sources(rng, blocks, heads), _queries(sizes, rng, batch)

    def error(made: jax.Array) -> float:
        scores = np.asarray(made)
        worst = [_beyond(scores, begun[:, None, None])]
        for b in np.flatnonzero(begun):
            pages = _sample(rng, int(begun[b]))
            expected = minmax_reference.page_scores(
                q[b : b + 1],
                base[source[table[b, pages]]],
                np.arange(len(pages))[None],
                [len(pages) * page],
                page_size=page,
            )
            worst.append(number_error(scores[b][..., pages], expected[0]))
        return max(worst)

    args = (_on_device(q), spread(base, source, used), *_on_device((table, lengths)))
    function = _jitted(dispatch.page_scores, page_size=page)
    moved = int(begun.sum()) * heads * base[0].nbytes + table.nbytes + 4 * table.size * heads
    return Case(function, args, error, ROWS, moved)


def prefill_attention(
    sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int
) -> Case:
    """A chunk of queries that ends at the second request's length over the keys of a prompt."""
    room, chunk, heads = sizes.pages * sizes.page, sizes.chunk, sizes.heads
    start = int(np.clip(lengths[1] - chunk, 0, room - chunk))
    shape = (heads, room, sizes.width)
    dtype = jnp.dtype(sizes.dtype)
    k, v = (rng.normal(size=shape, scale=s).astype(np.float32).astype(dtype) for s in (2, 1))
    # Finite, as they must be, and nothing that could be overlooked.
    k[:, start + chunk :], v[:, start + chunk :] = 50, 50
    q = rng.normal(size=(chunk, heads, sizes.group, sizes.width)).astype(dtype)

    def error(made: jax.Array) -> float:
        out = np.asarray(made, np.float32)
        worst = [0.0 if np.isfinite(out).all() else np.inf]
        for at, t in enumerate((0, 1, chunk // 2, chunk - 1)):
            h, end = at % heads, start + t + 1
            q64, k64, v64 = (np.asarray(x, np.float64) for x in (q[t, h], k[h, :end], v[h, :end]))
            expected, _ = decode_reference.attend(q64, k64, v64, scale=_scale(sizes))
            worst.append(row_error(out[t, h], expected))
        return max(worst)

    function = _jitted(dispatch.prefill_attention, scale=_scale(sizes))
    args = (*_on_device((q, k.swapaxes(1, 2).copy(), v)), _on_device(np.int32(start)))
    moved = 2 * heads * (start + chunk) * sizes.width * q.itemsize + 2 * q.nbytes
    # What is left of an average over 32 thousand tokens is small beside what was rounded.
    return Case(function, args, error, 2 * ROWS, moved)


READING: dict[str, Callable[..., Case]] = {
    "paged_decode": paged_decode,
    "slot_decode": slot_decode,
    "sketch_scores": sketch_scores,
    "page_scores": page_scores,
    "prefill_attention": prefill_attention,
}


@functools.cache
def _jitted(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """The same object each time, so that a kernel is compiled once for all cases of one size."""
    return jax.jit(functools.partial(function, **static))


def _on_device(tree: Any) -> Any:
    return jax.device_put(tree, platform.sharding())


def _scale(sizes: Sizes) -> float:
    return sizes.width**-0.5


def _queries(sizes: Sizes, rng: np.random.Generator, batch: int) -> np.ndarray:
    made = rng.normal(size=(batch, sizes.heads, sizes.group, sizes.width))
    return made.astype(jnp.dtype(sizes.dtype))


def _keys(sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    # Large enough that a few keys win: attention that ignored its weights would be seen.
    return random_pages(rng, sizes.page, sizes.width, dtype=sizes.dtype, scale=2)


def _chosen(rng: np.random.Generator, length: int, page: int, most: int) -> np.ndarray:
    """Up to `most` pages that have begun, in any order, the newest last."""
    begun = -(-length // page)
    if not begun:
        return np.zeros(0, np.int64)
    return np.append(rng.permutation(begun - 1)[: most - 1], begun - 1)


def _sample(rng: np.random.Generator, pages: int) -> np.ndarray:
    """Some of so many pages, the first and the last among them."""
    return np.unique(np.append(rng.integers(0, pages, _SAMPLE - 2), [0, pages - 1]))


def _beyond(scores: np.ndarray, pages: np.ndarray) -> float:
    """0 where scores [..., P] are -inf from page `pages` on, and only there; else infinite."""
    right = np.isneginf(scores) == (np.arange(scores.shape[-1]) >= pages)
    return 0.0 if right.all() and not np.isnan(scores).any() else float("inf")
