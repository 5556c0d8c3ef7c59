"""The kernels of a decode step, a rerank and a prompt: right at production shapes; how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from bench.gpu import cases_attention, cases_norm, cases_rerank, cases_scores
from bench.gpu.bandwidth import DEVICE
from bench.gpu.cases import Case
from bench.gpu.data import odd_lengths
from bench.gpu.report import Part, Skip
from bench.gpu.sizes import Sizes
from bench.gpu.timed import seconds_of
from flexijax.pallas_kernels import platform

READING: dict[str, Callable[..., Case]] = {
    "decode_attention": cases_attention.decode_attention,
    "sketch_query": cases_scores.sketch_query,
    "sketch_scores": cases_scores.sketch_scores,
    "page_scores": cases_scores.page_scores,
    "select_pages": cases_scores.select_pages,
    "paged_encode": cases_rerank.paged_encode,
    "slot_encode": cases_rerank.slot_encode,
    "rerank": cases_rerank.rerank,
    "prefill_attention": cases_attention.prefill_attention,
    "add_norm": cases_norm.add_norm,
}
# Those that read a pool, whose offsets pass 32 bits there.
BIG = ("decode_attention", "sketch_scores", "page_scores", "paged_encode")


def run(part: Part, sizes: Sizes, name: str) -> None:
    """One kernel: odd lengths, then the longest, against the oracle; then GB/s at the longest."""
    most, full = sizes.pages * sizes.page, []
    lengths = np.full(sizes.batch, most, np.int32)
    _check(part, "odd lengths", _make(sizes, name, odd_lengths(sizes.batch, most, sizes.page), 0))
    for seed in range(1, 1 + sizes.sets):
        full.append(_make(sizes, name, lengths, seed))
    full[0] = _check(part, "full length", full[0])
    if not part.right:
        return
    took = seconds_of(
        full[0].function,
        [(case.state, case.args) for case in full],
        calls=sizes.calls,
        rounds=sizes.rounds,
    )
    part.speed(name, ms=1e3 * took, gb_per_s=full[0].moved / took / 1e9, of=DEVICE)


def run_big(part: Part, sizes: Sizes, name: str) -> None:
    """One kernel on a pool of more than `sizes.big_bytes`, first and last blocks included."""
    lengths = odd_lengths(min(4, sizes.batch), sizes.pages * sizes.page, sizes.page)
    pool, rows = _largest(_make(sizes, name, lengths, 0))
    blocks = sizes.big_bytes // (pool // rows) + 64
    _room(pool // rows * blocks)
    _big(part, sizes, name, _make(sizes, name, lengths, 1, blocks=blocks))


def run_big_slots(part: Part, sizes: Sizes) -> None:
    """Decode attention of so many requests that their slots take more than `sizes.big_bytes`."""
    row = sizes.heads * sizes.slots * sizes.page * sizes.width * np.dtype(sizes.dtype).itemsize
    lengths = odd_lengths(sizes.big_bytes // row + 2, sizes.pages * sizes.page, sizes.page)
    lengths[-1] = lengths[0]
    _room(row * len(lengths))
    case = cases_attention.decode_slots(sizes, lengths, np.random.default_rng(0))
    _big(part, sizes, "slots", case)


def _room(pool: int) -> None:
    # Keys and values, one of them once more when made, and what either is compared with.
    needed, free = 5 * pool, platform.free_device_bytes()
    if free is not None and needed > free:
        raise Skip(f"{needed / 1e9:.1f} GB of device memory are needed, {free / 1e9:.1f} are free")


def _big(part: Part, sizes: Sizes, name: str, case: Case) -> None:
    size, _ = _largest(case)
    part.check(f"{name}: the array is large", size > sizes.big_bytes, f"{size / 1e9:.2f} GB")
    _check(part, f"{size} bytes", case)


def _largest(case: Case) -> tuple[int, int]:
    """Bytes and rows of the largest array that a kernel is given."""
    leaves = jax.tree.leaves((case.state, case.args))
    return max((leaf.nbytes, leaf.shape[0]) for leaf in leaves if leaf.ndim)


def _make(
    sizes: Sizes, name: str, lengths: np.ndarray, seed: int, blocks: int | None = None
) -> Case:
    rng = np.random.default_rng(seed)
    rows = len(lengths) * sizes.pages + 3
    return READING[name](sizes, lengths, rng, blocks=rows if blocks is None else blocks)


def _check(part: Part, what: str, case: Case) -> Case:
    """The case with the state that the call left."""
    out, state = jax.block_until_ready(case.function(case.state, *case.args))
    part.near(f"{what}: equal to float64", case.error(out, state), case.most)
    return dataclasses.replace(case, state=state)
