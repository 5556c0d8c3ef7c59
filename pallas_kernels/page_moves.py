"""Pages between the tiers without a copy in between: kernels that address pinned host memory.

One program moves one page's keys and values; a plan entry that is negative ends its program at
once. Both kernels write into an argument in place (`input_output_aliases`), so donate it.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton


def promote(
    slots_k: jax.Array, slots_v: jax.Array, host_k: jax.Array, host_v: jax.Array, load: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """slots[b, h, s] = host[load[b, h, s], h] where load >= 0; see `dispatch.promote`."""
    batch, heads, slots, page, width = slots_k.shape

    def kernel(_k, _v, host_k_ref, host_v_ref, load_ref, k_ref, v_ref):
        slot, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        block = load_ref[request, head, slot]

        @pl.when(block >= 0)
        def _():
            _copy(host_k_ref, (block, head), k_ref, (request, head, slot))
            _copy(host_v_ref, (block, head), v_ref, (request, head, slot))

    flat = (batch, heads, slots, page * width)
    new_k, new_v = pl.pallas_call(
        kernel,
        name="flexijax_promote",
        grid=(slots, heads, batch),
        out_shape=[jax.ShapeDtypeStruct(flat, slots_k.dtype)] * 2,
        input_output_aliases={0: 0, 1: 1},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=not platform.is_gpu(),
    )(slots_k.reshape(flat), slots_v.reshape(flat), _rows(host_k), _rows(host_v), load)
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
    arguments = (store_block, store_slot)
    return _offload(host_k, slots_k, *arguments), _offload(host_v, slots_v, *arguments)


def _offload(
    host: jax.Array, slots: jax.Array, store_block: jax.Array, store_slot: jax.Array
) -> jax.Array:
    # One output a kernel: XLA's host offloading pass aborts on a tuple in host memory.
    batch, heads, entries = store_slot.shape

    def kernel(_, slots_ref, block_ref, slot_ref, host_ref):
        entry, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        block, slot = block_ref[request, entry], slot_ref[request, head, entry]

        @pl.when((block >= 0) & (slot >= 0))
        def _():
            _copy(slots_ref, (request, head, slot), host_ref, (block, head))

    pool = _rows(host)
    new = pl.pallas_call(
        kernel,
        name="flexijax_offload",
        grid=(entries, heads, batch),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={0: 0},
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=not platform.is_gpu(),
    )(pool, _rows(slots), store_block, store_slot)
    return new.reshape(host.shape)


def _rows(pages: jax.Array) -> jax.Array:
    """[..., page, H] -> [..., page * H]: a page as one run of memory."""
    return pages.reshape(*pages.shape[:-2], -1)


def _copy(source_ref, source: tuple, target_ref, target: tuple) -> None:
    """One page to another place, 128 bits at a time; a mask covers sizes such as 16 * 80."""
    size = source_ref.shape[-1]
    place = jnp.arange(pl.next_power_of_2(size))
    mask = None if place.size == size else place < size
    values = pltriton.load(source_ref.at[(*source, place)], mask=mask)
    pltriton.store(target_ref.at[(*target, place)], values, mask=mask)
