"""The kernels that read: right at production shapes, with odd lengths and huge pools; how fast."""

from __future__ import annotations

import jax
import numpy as np

from bench.gpu.bandwidth import DEVICE
from bench.gpu.cases import READING, Case
from bench.gpu.data import odd_lengths
from bench.gpu.report import Part, Skip
from bench.gpu.sizes import Sizes
from bench.gpu.timed import seconds_of
from flexijax.pallas_kernels import platform

BIG = ("paged_decode", "slot_decode", "sketch_scores", "page_scores")


def run(part: Part, sizes: Sizes, name: str) -> None:
    """One kernel: odd lengths, then the longest, against the oracle; then GB/s at the longest."""
    most, full = sizes.pages * sizes.page, []
    lengths = np.full(sizes.batch, most, np.int32)
    _check(part, "odd lengths", _make(sizes, name, odd_lengths(sizes.batch, most, sizes.page), 0))
    for seed in range(1, 1 + sizes.sets):
        full.append(_make(sizes, name, lengths, seed))
    _check(part, "full length", full[0])
    if not part.right:
        return
    took = seconds_of(
        full[0].function, [case.args for case in full], calls=sizes.calls, rounds=sizes.rounds
    )
    part.speed(name, ms=1e3 * took, gb_per_s=full[0].moved / took / 1e9, of=DEVICE)


def run_big(part: Part, sizes: Sizes, name: str) -> None:
    """One kernel on arrays of more than `sizes.big_bytes`, first and last blocks included."""
    lengths = odd_lengths(min(4, sizes.batch), sizes.pages * sizes.page, sizes.page)
    small = _make(sizes, name, lengths, 0)
    pool = max(jax.tree.leaves(small.args), key=lambda leaf: leaf.nbytes)
    rows = pool.shape[3] if name == "slot_decode" else pool.shape[0]
    blocks = sizes.big_bytes // (pool.nbytes // rows) + 64
    needed, free = 3.5 * pool.nbytes / rows * blocks, platform.free_device_bytes()
    del small, pool
    if free is not None and needed > free:
        raise Skip(f"{needed / 1e9:.1f} GB of device memory are needed, {free / 1e9:.1f} are free")
    case = _make(sizes, name, lengths, 1, blocks=blocks)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(case.args))
    part.check(f"{name}: the pool is large", largest > sizes.big_bytes, f"{largest / 1e9:.2f} GB")
    _check(part, f"{largest} bytes", case)


def _make(
    sizes: Sizes, name: str, lengths: np.ndarray, seed: int, blocks: int | None = None
) -> Case:
    rows = sizes.slots if name == "slot_decode" else len(lengths) * sizes.pages + 3
    rng = np.random.default_rng(seed)
    return READING[name](sizes, lengths, rng, blocks=rows if blocks is None else blocks)


def _check(part: Part, what: str, case: Case) -> None:
    made = jax.block_until_ready(case.function(*case.args))
    part.near(f"{what}: equal to float64", case.error(made), case.most)
