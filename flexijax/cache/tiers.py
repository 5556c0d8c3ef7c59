"""Moving pages between the tiers: `zero_copy` kernels on pinned memory, or `staged` copies.

Both move exactly the pages that the plan names. Staged copies go page by page in a loop whose
length is the number of pages, so nothing is padded.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexijax.cache import coded_host
from flexijax.cache.coded_host import CodedHost
from flexijax.cache.layout import CacheSizes
from flexijax.cache.staging import entries, to_device, to_host, to_host_index
from flexijax.pallas_kernels import dispatch, dispatch_rerank, placing, platform
from flexijax.pallas_kernels.filled import find_slots
from flexijax.policies.codec import Codec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostPages:
    """The host tier of a head group: every page of its heads, in pinned host memory."""

    k: jax.Array  # [blocks, K, page, H]
    v: jax.Array  # [blocks, K, page, H]


AnyHost: TypeAlias = HostPages | CodedHost


def empty_host(sizes: CacheSizes, heads: int, codec: Codec | None = None) -> AnyHost:
    """Host pages of so many heads, unwritten; over a mesh of so many a device, local to each."""
    where, mesh = platform.sharding("pinned_host"), placing.current_mesh()

    def unwritten(page: jax.ShapeDtypeStruct) -> jax.Array:
        # NumPy's zeros take no memory until they are copied; jax cannot fill a host array itself.
        if mesh is not None:
            shape = (page.shape[0], page.shape[1] * mesh.size, *page.shape[2:])
            return placing.cut(np.zeros(shape, page.dtype), 1, "pinned_host")
        return jax.device_put(np.zeros(page.shape, page.dtype), where)

    return jax.tree.map(unwritten, abstract_host(sizes, heads, codec))


def abstract_host(sizes: CacheSizes, heads: int, codec: Codec | None = None) -> AnyHost:
    """The shapes of `empty_host`."""
    if codec is not None:
        words: Any = jax.ShapeDtypeStruct(
            (sizes.blocks, heads, codec.words(sizes.page)), jnp.uint32
        )
        return CodedHost(words, codec, sizes.page)
    shape = (sizes.blocks, heads, sizes.page_size, sizes.shape.head_dim)
    page: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(sizes.dtype))
    return HostPages(page, page)


def promote(
    slots_k: jax.Array,
    slots_v: jax.Array,
    host: AnyHost,
    load_block: jax.Array,
    *,
    transfer: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Pages from the host into device slots; arrays as `dispatch.promote`, which see.

    slots_k [B, K, H, S, page], slots_v [B, K, S, page, H]; load_block int32[B, K, S], the block to
    load into each slot, -1 to leave it. Returns the new slots, updated in place when donated.
    """
    if isinstance(host, CodedHost):
        return coded_host.promote(slots_k, slots_v, host, load_block)
    if (transfer or platform.default_transfer()) == "zero_copy":
        return dispatch.promote(slots_k, slots_v, host.k, host.v, load_block)
    moves, count = entries(load_block)
    host_k, host_v = map(_as_bits, (host.k, host.v))

    def move(i: jax.Array, slots: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, head, slot = moves[0][i], moves[1][i], moves[2][i]
        block = load_block[row, head, slot]
        at = (block, head, 0, 0)
        k, v = to_device(_read(host_k, at)), to_device(_read(host_v, at))
        k = k.swapaxes(-1, -2)[:, :, :, None]  # [1, 1, H, 1, page]
        return (
            lax.dynamic_update_slice(slots[0], k, (row, head, 0, slot, 0)),
            lax.dynamic_update_slice(slots[1], v[:, :, None], (row, head, slot, 0, 0)),
        )

    k, v = lax.fori_loop(0, count, move, (_as_bits(slots_k), _as_bits(slots_v)))
    return _of_bits(k, slots_k), _of_bits(v, slots_v)


def offload(
    host: HostPages,
    slots_k: jax.Array,
    slots_v: jax.Array,
    store_block: jax.Array,
    store_slot: jax.Array,
    *,
    transfer: str | None,
) -> HostPages:
    """Pages from device slots into host blocks; arrays as `dispatch.offload`, which see.

    store_block int32[B, E], -1 for none; store_slot int32[B, K, E], -1 for none. Returns the new
    host tier, updated in place when donated.
    """
    if (transfer or platform.default_transfer()) == "zero_copy":
        moved = dispatch.offload(host.k, host.v, slots_k, slots_v, store_block, store_slot)
        # A kernel's outputs count as device memory, aliased or not; this names where they lie, and
        # copies nothing.
        return HostPages(*map(to_host, moved))
    valid = jnp.where(store_block[:, None] >= 0, store_slot, -1)
    moves, count = entries(valid)
    width, page = slots_k.shape[2], slots_k.shape[4]
    slots_k, slots_v = _as_bits(slots_k), _as_bits(slots_v)

    def move(i: jax.Array, pools: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, head, entry = moves[0][i], moves[1][i], moves[2][i]
        slot, block = store_slot[row, head, entry], store_block[row, entry]
        k = lax.dynamic_slice(slots_k, (row, head, 0, slot, 0), (1, 1, width, 1, page))
        v = lax.dynamic_slice(slots_v, (row, head, slot, 0, 0), (1, 1, 1, page, width))
        at = to_host_index((block, head, 0, 0))
        return (
            lax.dynamic_update_slice(pools[0], to_host(k[:, :, :, 0].swapaxes(-1, -2)), at),
            lax.dynamic_update_slice(pools[1], to_host(v[:, :, 0]), at),
        )

    k, v = lax.fori_loop(0, count, move, (_as_bits(host.k), _as_bits(host.v)))
    return HostPages(_of_bits(k, host.k), _of_bits(v, host.v))


def offload_pages(
    host: HostPages,
    slots_k: jax.Array,
    slots_v: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
    *,
    transfer: str | None,
) -> HostPages:
    """As `offload`, of the pages int32[B, E] in the slots of slot_page int32[B, K, S] they lie in.

    block: int32[B, E], of each page; -1 for none in all three.
    """
    if (transfer or platform.default_transfer()) == "zero_copy":
        moved = dispatch_rerank.offload_pages(
            host.k, host.v, slots_k, slots_v, slot_page, page, block
        )
        return HostPages(*map(to_host, moved))
    slot = find_slots(slot_page, page)
    return offload(host, slots_k, slots_v, block, slot, transfer="staged")


def _as_bits(x: jax.Array) -> jax.Array:
    """bfloat16 on a CPU as integers; everything else as it is.

    XLA for a CPU would convert the whole array to float32 and back for each page that it updates.
    """
    if x.dtype != jnp.bfloat16 or platform.is_gpu():
        return x
    return lax.bitcast_convert_type(x, jnp.uint16)


def _of_bits(x: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_as_bits`, in the dtype of `like`."""
    return x if x.dtype == like.dtype else lax.bitcast_convert_type(x, like.dtype)


def _read(pool: jax.Array, at: tuple) -> jax.Array:
    """One page [1, 1, page, H] of a host pool, still on the host."""
    return lax.dynamic_slice(pool, to_host_index(at), (1, 1, *pool.shape[2:]))
