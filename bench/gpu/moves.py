"""Pages between the tiers, by the mover of the cache: bit for bit, in place, how fast."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from bench.gpu.bandwidth import TO_DEVICE, TO_HOST
from bench.gpu.data import random_pages, same_bits, sources
from bench.gpu.report import Part, Skip
from bench.gpu.sizes import Sizes
from bench.gpu.timed import seconds_in_place
from flexijax.cache.memory import available_bytes
from flexijax.cache.tiers import HostPages, offload, promote
from flexijax.engine.jit_cache import jitted
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.page_moves import reference

# Pages of a head that go to the host after a chunk of steps.
_ENTRIES = 2


@dataclasses.dataclass
class Tiers:
    """Both tiers and, in NumPy, what they have to hold."""

    k: Any  # [B, K, H, S, page], slots
    v: Any  # [B, K, S, page, H]
    host: HostPages  # [blocks, K, page, H]

    @classmethod
    def make(cls, sizes: Sizes, *, blocks: int, batch: int, rng: np.random.Generator) -> Tiers:
        """In NumPy. A page of NaN is among them: its bits have to arrive too."""
        base = random_pages(rng, sizes.page, sizes.width, dtype=sizes.dtype, scale=1)
        base[0] = np.nan
        shape = (batch, sizes.heads, sizes.slots)
        k, v = (base[sources(rng, *shape)] for _ in "kv")
        host: Any = (base[sources(rng, blocks, sizes.heads)] for _ in "kv")
        return cls(np.ascontiguousarray(k.transpose(0, 1, 4, 2, 3)), v, HostPages(*host))

    def placed(self) -> Tiers:
        """The same as arrays of jax, each in the memory of its tier."""
        host = jax.device_put(self.host, platform.sharding("pinned_host"))
        k, v = jax.device_put((self.k, self.v), platform.sharding())
        return Tiers(k, v, host)

    def arrays(self) -> tuple[Any, ...]:
        """All four."""
        return self.k, self.v, self.host.k, self.host.v


def offload_program(transfer: str | None, host: HostPages, *rest: jax.Array) -> HostPages:
    """`tiers.offload` as a program; host is donated."""
    return offload(host, *rest, transfer=transfer)


def promote_program(
    transfer: str | None, slots: tuple[jax.Array, jax.Array], host: HostPages, load: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`tiers.promote` as a program; the slots are donated."""
    return promote(*slots, host, load, transfer=transfer)


def store_plan(
    rng: np.random.Generator, sizes: Sizes, *, blocks: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """(store_block int32[B, E], store_slot int32[B, K, E]), some of them negative, no block twice.

    The last block is among them.
    """
    block = rng.permutation(blocks - 1)[: batch * _ENTRIES].astype(np.int32)
    block[rng.random(block.shape) < 0.2] = -1
    block[0] = blocks - 1
    slot = rng.integers(-1, sizes.slots, (batch, sizes.heads, _ENTRIES), dtype=np.int32)
    return block.reshape(batch, _ENTRIES), slot


def load_plan(
    rng: np.random.Generator, sizes: Sizes, *, blocks: int, batch: int, share: float
) -> np.ndarray:
    """int32[B, K, S]: a block for that share of the slots, the last block among them."""
    shape = (batch, sizes.heads, sizes.slots)
    load = np.where(rng.random(shape) < share, rng.integers(0, blocks, shape), -1)
    load[0, 0, 0] = blocks - 1
    return load.astype(np.int32)


def round_trips(part: Part, sizes: Sizes) -> None:
    """Pages to the host and others back, `sizes.trips` times, against NumPy's own after each."""
    rng, batch, blocks = np.random.default_rng(0), min(4, sizes.batch), 16 * sizes.slots
    wanted = Tiers.make(sizes, blocks=blocks, batch=batch, rng=rng)
    # A CPU takes NumPy's own memory as it is, which cannot be donated: that trip does not count.
    plan = _plan(rng, sizes, blocks=blocks, batch=batch)
    held, wanted = _trip(wanted.placed(), *plan), _wanted(wanted, *plan)
    places = _places(held)
    right, donated, stayed, pinned = (0 for _ in range(4))
    part.progress("round trips", 0, sizes.trips)
    for trip in range(sizes.trips):
        before, plan = held, _plan(rng, sizes, blocks=blocks, batch=batch)
        held, wanted = _trip(held, *plan), _wanted(wanted, *plan)
        right += all(map(same_bits, held.arrays(), wanted.arrays()))
        donated += all(array.is_deleted() for array in before.arrays())
        stayed += _places(held) == places
        pinned += all(a.sharding.memory_kind == "pinned_host" for a in (held.host.k, held.host.v))
        part.progress("round trips", trip + 1, sizes.trips)
    for what, count in (
        ("all bits of both tiers are right", right),
        ("the arrays before are donated", donated),
        ("buffers stay where they are", stayed),
        ("the host tier stays in pinned memory", pinned),
    ):
        part.check(what, count == sizes.trips, f"{count} of {sizes.trips} trips")


def _places(held: Tiers) -> object:
    """Where the buffers lie; equal to nothing where the runtime does not say."""
    try:
        return [array.unsafe_buffer_pointer() for array in held.arrays()]
    except jax.errors.JaxRuntimeError:
        return object()


def _plan(
    rng: np.random.Generator, sizes: Sizes, *, blocks: int, batch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(store_block, store_slot, load) of a trip."""
    store = store_plan(rng, sizes, blocks=blocks, batch=batch)
    return *store, load_plan(rng, sizes, blocks=blocks, batch=batch, share=0.4)


def _trip(held: Tiers, block: np.ndarray, slot: np.ndarray, load: np.ndarray) -> Tiers:
    block, slot, load = jax.device_put((block, slot, load), platform.sharding())
    store = jitted(offload_program, None, (0,))
    host = store(held.host, held.k, held.v, block, slot)
    k, v = jitted(promote_program, None, (0,))((held.k, held.v), host, load)
    return Tiers(k, v, host)


def _wanted(held: Tiers, block: np.ndarray, slot: np.ndarray, load: np.ndarray) -> Tiers:
    stored: Any = reference.offload(held.host.k, held.host.v, held.k, held.v, block, slot)
    host = HostPages(*stored)
    return Tiers(*reference.promote(held.k, held.v, host.k, host.v, load), host)


def run(part: Part, sizes: Sizes, *, blocks: int | None = None) -> None:
    """Offload and promote at production shapes, then GB/s over the link.

    blocks: of the host tier; None is a block for each page, and only then speeds follow.
    """
    rng, batch = np.random.default_rng(0), sizes.batch
    rows = blocks or batch * sizes.pages
    wanted = Tiers.make(sizes, blocks=rows, batch=batch, rng=rng)
    held = wanted.placed()
    plan = _plan(rng, sizes, blocks=rows, batch=batch)
    held, wanted = _trip(held, *plan), _wanted(wanted, *plan)
    size = f"{wanted.host.k.nbytes} bytes on the host"
    for name, made, expected in zip(
        ("slots k", "slots v", "host k", "host v"), held.arrays(), wanted.arrays(), strict=True
    ):
        part.check(f"{name} bit for bit, {size}", same_bits(made, expected))
    del wanted
    if part.right and blocks is None:
        _speeds(part, sizes, held, rng, rows)


def run_big(part: Part, sizes: Sizes) -> None:
    """The same with a host tier of more than `sizes.big_bytes` in each of its two arrays."""
    itemsize = np.dtype("uint16").itemsize
    blocks = sizes.big_bytes // (sizes.heads * sizes.page * sizes.width * itemsize) + 64
    # Twice as placed and as wanted, and copies of one array while bits are compared.
    needed, free = 9 * sizes.big_bytes, available_bytes()[1]
    if needed > free:
        raise Skip(f"{needed / 1e9:.0f} GB of host memory are needed, {free / 1e9:.0f} are free")
    run(part, dataclasses.replace(sizes, batch=min(4, sizes.batch)), blocks=blocks)


def _speeds(part: Part, sizes: Sizes, held: Tiers, rng: np.random.Generator, blocks: int) -> None:
    """Every slot loaded; every slot stored: what a rerank from empty and a prompt's commit move."""
    batch, heads, slots = sizes.batch, sizes.heads, sizes.slots
    load = load_plan(rng, sizes, blocks=blocks, batch=batch, share=1.0)
    block = rng.permutation(blocks)[: batch * slots].astype(np.int32).reshape(batch, slots)
    slot = np.broadcast_to(np.arange(slots, dtype=np.int32), (batch, heads, slots)).copy()
    load, block, slot = jax.device_put((load, block, slot), platform.sharding())
    moved = batch * heads * slots * 2 * sizes.page * sizes.width * held.v.dtype.itemsize
    promotion = jitted(promote_program, None, (0,))
    took, (k, v) = seconds_in_place(
        lambda state: promotion(state, held.host, load),
        (held.k, held.v),
        calls=1,
        rounds=sizes.rounds,
    )
    part.speed("promote", ms=1e3 * took, gb_per_s=moved / took / 1e9, of=TO_DEVICE)
    store = jitted(offload_program, None, (0,))
    took, _ = seconds_in_place(
        lambda host: store(host, k, v, block, slot), held.host, calls=1, rounds=sizes.rounds
    )
    part.speed("offload", ms=1e3 * took, gb_per_s=moved / took / 1e9, of=TO_HOST)
