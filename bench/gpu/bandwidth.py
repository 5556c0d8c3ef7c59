"""What a plain copy reaches: within device memory, and over the link to the host."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.gpu.data import same_bits
from bench.gpu.report import Part
from bench.gpu.sizes import Sizes
from bench.gpu.timed import seconds_in_place
from bench.timing import median
from flexijax.pallas_kernels import platform

DEVICE, TO_DEVICE, TO_HOST = "copy on the device", "host to device", "device to host"


def run(part: Part, sizes: Sizes) -> None:
    """The speeds that others are a share of: bytes read and written, or crossing the link."""
    count = sizes.copy_bytes // 4
    start = jax.device_put(np.zeros(count, np.float32), platform.sharding())
    # Read and written in place: what a copy does, without a second array.
    add = jax.jit(functools.partial(_add_often, sizes.calls), donate_argnums=0)
    seconds, made = seconds_in_place(add, start, calls=1, rounds=sizes.rounds)
    wanted = sizes.calls * (1 + sizes.rounds)
    part.check("all numbers were added to", bool((made == wanted).all()))
    across = _across(part, np.arange(count, dtype=np.int32), sizes)
    part.speed(DEVICE, gb_per_s=2 * sizes.copy_bytes * sizes.calls / seconds / 1e9)
    for name, took in across.items():
        part.speed(name, gb_per_s=sizes.copy_bytes / took / 1e9)


def _add_often(calls: int, x: jax.Array) -> jax.Array:
    # What is added is not known to the compiler, so that it cannot add all at once.
    return lax.fori_loop(0, calls, lambda at, y: y + jnp.where(at < 0, 2.0, 1.0), x)


def _across(part: Part, content: np.ndarray, sizes: Sizes) -> dict[str, float]:
    """Seconds of one copy each way, between device memory and pinned host memory."""
    held = {kind: platform.sharding(kind) for kind in ("device", "pinned_host")}
    found: dict[str, float] = {}
    pinned = jax.block_until_ready(jax.device_put(content, held["pinned_host"]))
    for name, source, target in (
        (TO_DEVICE, pinned, "device"),
        (TO_HOST, jax.device_put(content, held["device"]), "pinned_host"),
    ):
        times = []
        made = jax.block_until_ready(jax.device_put(source, held[target]))
        for _ in range(sizes.rounds):
            started = time.perf_counter()
            made = jax.block_until_ready(jax.device_put(source, held[target]))
            times.append(time.perf_counter() - started)
        part.check(f"{name}: nothing lost", same_bits(made, content))
        found[name] = median(times)
    return found
