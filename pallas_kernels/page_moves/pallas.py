"""Pages between the tiers without a copy in between: kernels that address pinned host memory.

One program moves one page's keys and values; a plan entry that is negative ends its program at
once. The kernels write into an argument in place (`input_output_aliases`), so donate it. Keys are
transposed on the way: a page is [page, H] in the host tier and [H, page] in a slot.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.in_kernel import find_slot
from flexijax.pallas_kernels.platform import pltriton


def promote(
    slots_k: jax.Array, slots_v: jax.Array, host_k: jax.Array, host_v: jax.Array, load: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """slots[b, h, s] = host[load[b, h, s], h] where load >= 0; see `dispatch.promote`."""
    batch, heads, slots, page, width = slots_v.shape
    k_shape, v_shape = _matrix(slots_k), (batch, heads, slots * page, width)

    def kernel(_k, _v, host_k_ref, host_v_ref, load_ref, k_ref, v_ref):
        slot, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        block = load_ref[request, head, slot]

        @pl.when(block >= 0)
        def _():
            token, column, inside = _tile(page, width)
            place = slot * page + token
            for host_ref, ref, transposed in (
                (host_k_ref, k_ref, True),
                (host_v_ref, v_ref, False),
            ):
                values = _load(host_ref, (block, head), token, column, inside, transposed=False)
                _store(ref, (request, head), place, column, values, inside, transposed=transposed)

    new_k, new_v = platform.pallas_kernel(
        kernel,
        name="flexijax_promote",
        grid=(slots, heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct(k_shape, slots_k.dtype),
            jax.ShapeDtypeStruct(v_shape, slots_v.dtype),
        ],
        aliases={0: 0, 1: 1},
        num_warps=4,
    )(slots_k.reshape(k_shape), slots_v.reshape(v_shape), host_k, host_v, load)
    return new_k.reshape(slots_k.shape), new_v.reshape(slots_v.shape)


def offload(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    store_block: jax.Array,
    store_slot: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """host[store_block[b, e], h] = slots[b, h, store_slot[b, h, e]]; see `dispatch.offload`."""

    def find(refs, request, head, entry):
        [slot_ref] = refs
        return slot_ref[request, head, entry]

    return _offload_both((host_k, host_v), (slots_k, slots_v), store_block, (store_slot,), find)


def offload_pages(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `offload`, of pages that are looked for; see `dispatch_rerank.offload_pages`."""
    slots = slot_page.shape[2]

    def find(refs, request, head, entry):
        slot_page_ref, page_ref = refs
        return find_slot(slot_page_ref, request, head, page_ref[request, entry], slots=slots)

    return _offload_both((host_k, host_v), (slots_k, slots_v), block, (slot_page, page), find)


def _offload_both(
    host: tuple[jax.Array, jax.Array],
    slots: tuple[jax.Array, jax.Array],
    block: jax.Array,
    where: tuple[jax.Array, ...],
    find: Callable[..., jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Keys and values; find: the slot of an entry, of what is in the arrays `where`."""
    slots_k, slots_v = slots
    batch, heads, count, page, width = slots_v.shape
    k_matrix = slots_k.reshape(_matrix(slots_k))
    v_matrix = slots_v.reshape(batch, heads, count * page, width)
    new_k = _offload(host[0], k_matrix, block, where, find, transposed=True)
    return new_k, _offload(host[1], v_matrix, block, where, find, transposed=False)


def _offload(
    host: jax.Array,
    slots: jax.Array,
    block: jax.Array,
    where: tuple[jax.Array, ...],
    find: Callable[..., jax.Array],
    *,
    transposed: bool,
) -> jax.Array:
    # One output a kernel: XLA's host offloading pass aborts on a tuple in host memory.
    batch, heads = slots.shape[:2]
    page, width = host.shape[2:]

    def kernel(_, slots_ref, block_ref, *rest):
        *refs, host_ref = rest
        entry, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        block, slot = block_ref[request, entry], find(refs, request, head, entry)

        @pl.when((block >= 0) & (slot >= 0))
        def _():
            token, column, inside = _tile(page, width)
            place = slot * page + token
            values = _load(slots_ref, (request, head), place, column, inside, transposed=transposed)
            _store(host_ref, (block, head), token, column, values, inside, transposed=False)

    return platform.pallas_kernel(
        kernel,
        name="flexijax_offload",
        grid=(block.shape[1], heads, batch),
        out_shape=jax.ShapeDtypeStruct(host.shape, host.dtype),
        aliases={0: 0},
        num_warps=4,
    )(host, slots, block, *where)


def _matrix(slots_k: jax.Array) -> tuple[int, int, int, int]:
    """The shape of k slots [B, K, H, S, page] with tokens along one axis."""
    batch, heads, width, slots, page = slots_k.shape
    return batch, heads, width, slots * page


def _tile(page: int, width: int):
    """Token and channel numbers of a page, and a mask [page, H] where H is no power of two."""
    token, column = jnp.arange(page), jnp.arange(pl.next_power_of_2(width))
    inside = jnp.broadcast_to((column < width)[None, :], (page, column.size))
    return token, column, None if column.size == width else inside


def _load(ref, lead, token, column, mask, *, transposed):
    """[page, H] from rows of tokens, or, transposed, from rows of channels."""
    if not transposed:
        return pltriton.load(ref.at[(*lead, token[:, None], column[None, :])], mask=mask)
    mask = None if mask is None else mask.T
    return pltriton.load(ref.at[(*lead, column[:, None], token[None, :])], mask=mask).T


def _store(ref, lead, token, column, values, mask, *, transposed):
    """[page, H] into rows of tokens, or, transposed, into rows of channels."""
    if not transposed:
        pltriton.store(ref.at[(*lead, token[:, None], column[None, :])], values, mask=mask)
        return
    mask = None if mask is None else mask.T
    pltriton.store(ref.at[(*lead, column[:, None], token[None, :])], values.T, mask=mask)
