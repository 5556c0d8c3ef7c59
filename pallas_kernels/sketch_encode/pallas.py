"""Sketches of pages that filled up in one kernel: keys read where they lie, codes written in place.

One program makes the bit planes of 32 channels of one page of one head. It multiplies the whole
keys with the rows of Hadamard's matrix of those channels, whose signs it works out; an entry of -1
ends its programs at once. The pool of codes is aliased (`input_output_aliases`), so donate it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.in_kernel import find_slot
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sketches import WORD, SketchCode

# The least side of a matrix product on tensor cores.
_SIDE = 16
# Numbers of keys that are multiplied at a time: what registers hold.
_TILE = 2048


def paged_encode(
    codes: jax.Array, code: SketchCode, k_pages: jax.Array, block: jax.Array
) -> jax.Array:
    """See `dispatch_rerank.paged_encode`."""

    def find(refs, request, head, entry, token):
        [block_ref] = refs
        at = block_ref[request, entry]
        return at, at >= 0, lambda channel: (at, head, token[None, :], channel[:, None])

    return _encode(codes, code, k_pages, (block,), find, block.shape[1], k_pages.shape[2])


def slot_encode(
    codes: jax.Array,
    code: SketchCode,
    k_slots: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> jax.Array:
    """See `dispatch_rerank.slot_encode`."""
    batch, heads, width, slots, page_size = k_slots.shape

    def find(refs, request, head, entry, token):
        slot_page_ref, page_ref, block_ref = refs
        at = block_ref[request, entry]
        slot = find_slot(slot_page_ref, request, head, page_ref[request, entry], slots=slots)
        place = (slot * page_size + token)[None, :]
        there = (at >= 0) & (slot >= 0)
        return at, there, lambda channel: (request, head, channel[:, None], place)

    matrix = k_slots.reshape(batch, heads, width, slots * page_size)
    return _encode(codes, code, matrix, (slot_page, page, block), find, page.shape[1], page_size)


def _encode(
    codes: jax.Array,
    code: SketchCode,
    keys: jax.Array,
    where: tuple[jax.Array, ...],
    find: Callable[..., Any],
    entries: int,
    page_size: int,
) -> jax.Array:
    """find: (block of an entry, whether there is one, where its keys [channels, tokens] lie)."""
    batch, heads, width = code.mean.shape
    bits, words = codes.shape[2:4]
    rows, columns = max(_SIDE, pl.next_power_of_2(width)), max(_SIDE, page_size)
    tile = min(rows, max(_SIDE, _TILE // columns))
    precision = platform.float32_precision() if keys.dtype == jnp.float32 else None

    def kernel(_, mean_ref, step_ref, k_ref, *rest):
        # codes [blocks, K, bits, W, page], mean and step [B, K, H], keys, what `find`
        # reads, and the codes once more, to be written.
        *refs, out_ref = rest
        entry, word = lax.div(pl.program_id(0), words), lax.rem(pl.program_id(0), words)
        head, request = pl.program_id(1), pl.program_id(2)
        token = jnp.arange(columns)
        block, there, place = find(refs, request, head, entry, token)

        @pl.when(there)
        def _():
            mine = word * WORD + jnp.arange(WORD)

            def add(index, total):
                channel = index * tile + jnp.arange(tile)
                inside = (channel < width)[:, None] & (token < page_size)[None, :]
                part = pltriton.load(k_ref.at[place(channel)], mask=inside, other=0.0)
                return total + lax.dot_general(
                    _signs(mine, channel, width).astype(part.dtype),
                    part,
                    (((1,), (0,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )

            total = jnp.zeros((WORD, columns), jnp.float32)
            total = lax.fori_loop(0, rows // tile, add, total) if tile < rows else add(0, total)
            rotated = total * float(width & -width) ** -0.5
            real = mine < width
            mean = pltriton.load(mean_ref.at[request, head, mine], mask=real, other=0.0)
            step = pltriton.load(step_ref.at[request, head, mine], mask=real, other=1.0)
            half = 2 ** (bits - 1)
            level = jnp.floor((rotated - mean[:, None]) / step[:, None]) + half
            level = jnp.clip(level, 0, 2 * half - 1).astype(jnp.int32)
            level = jnp.where(real[:, None], level, 0)
            for bit in range(bits):
                # Each channel has a bit of its own, so the sum is their union.
                plane = jnp.sum(((level >> bit) & 1) << jnp.arange(WORD)[:, None], axis=0)
                plane = lax.bitcast_convert_type(plane.astype(jnp.int32), jnp.uint32)
                at = out_ref.at[block, head, bit, word, token]
                pltriton.store(at, plane, mask=token < page_size)

    return platform.pallas_kernel(
        kernel,
        name="flexijax_sketch_encode",
        grid=(entries * words, heads, batch),
        out_shape=jax.ShapeDtypeStruct(codes.shape, codes.dtype),
        num_warps=4,
        aliases={0: 0},
    )(codes, code.mean, code.step, keys, *where)


def _signs(row: jax.Array, column: jax.Array, width: int) -> jax.Array:
    """Of Hadamard's matrix of `width`, see `sketches.rotate`: -1, 1, or 0 beside the diagonal.

    The sign is that of the number of bits that row and column have in common.
    """
    block = width & -width
    common = row[:, None] & column[None, :] & (block - 1)
    for shift in (8, 4, 2, 1):
        if 1 << shift < block:
            common ^= common >> shift
    alike = lax.div(row, block)[:, None] == lax.div(column, block)[None, :]
    return jnp.where(alike, 1 - 2 * (common & 1), 0)
