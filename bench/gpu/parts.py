"""The parts by name, in the order in which they run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bench.gpu import bandwidth, kernels, large_model, memcheck, moves, small_model
from bench.gpu.kernels import READING
from bench.gpu.report import BANDWIDTH, Part
from bench.gpu.sizes import Sizes

PARTS: dict[str, Callable[[Part, Sizes], None]] = {
    BANDWIDTH: bandwidth.run,
    **{name: functools.partial(kernels.run, name=name) for name in READING},
    "page_moves": moves.run,
    **{f"big_{name}": functools.partial(kernels.run_big, name=name) for name in kernels.BIG},
    "big_slots": kernels.run_big_slots,
    "big_page_moves": moves.run_big,
    "round_trips": moves.round_trips,
    "tokens": small_model.tokens,
    "tiers": small_model.tiers,
    "prompt": large_model.prompt,
    "decode": large_model.decode,
}
MEMCHECK = "memcheck"
# Only asked for by name: it runs the others.
EXTRA: dict[str, Callable[[Part, Sizes], None]] = {MEMCHECK: memcheck.run}
