"""The tail of heads whose full pages are coded: in the cache's dtype, until they are coded.

It has room for the pages that are not full when a chunk begins, and for those that can begin in it.
Page p stands in slot p % T of k [B, K, H, T, page] and v [B, K, T, page, H], values rotated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, zeros
from flexijax.cache.layout import CacheSizes, tail_pages
from flexijax.pallas_kernels.filled import keys_in_slots, values_in_slots
from flexijax.pallas_kernels.stores import SlotStore
from flexijax.policies.codec import Codec


def empty_tail(sizes: CacheSizes, heads: int) -> tuple[jax.Array, jax.Array]:
    """k and v of so many heads."""
    batch, page, width, tail = sizes.batch, sizes.page_size, sizes.shape.head_dim, tail_pages(sizes)
    k = zeros((batch, heads, width, tail, page), sizes.dtype)
    return k, zeros((batch, heads, tail, page, width), sizes.dtype)


def pages_in(v: jax.Array, coded: jax.Array) -> jax.Array:
    """int32[B, K, T]: the page in each slot of a tail, where int32[B] tokens are coded.

    The first page that is not coded, and those that follow it, begun or not.
    """
    batch, heads, tail, page_size, _ = v.shape
    first = lax.div(coded, page_size)[:, None]
    slot = jnp.arange(tail, dtype=jnp.int32)
    page = first + lax.rem(slot - lax.rem(first, tail) + tail, tail)
    return jnp.broadcast_to(page[:, None], (batch, heads, tail))


def store_of(
    k: jax.Array, v: jax.Array, coded: jax.Array, held: jax.Array, heads: tuple[int, ...]
) -> SlotStore:
    """Where a step's token goes, and what of the tail is attended: all."""
    return SlotStore(k, v, pages_in(v, coded), held, heads)


def begun(k: jax.Array, v: jax.Array, full: jax.Array, tail: int) -> tuple[jax.Array, jax.Array]:
    """A request's tail at its prompt's end: k [K, H, T, page], v [K, T, page, H].

    k [K, H, P, page], v [K, P, page, H]: of the prompt, of which int32[] pages are full.
    """
    mine = (jnp.arange(tail, dtype=jnp.int32) == lax.rem(full, tail))[:, None]
    k_page = lax.dynamic_slice_in_dim(k, full, 1, axis=2)
    v_page = lax.dynamic_slice_in_dim(v, full, 1, axis=1)
    return jnp.where(mine, k_page, 0), jnp.where(mine[..., None], v_page, 0)


def coded_pages(
    k: jax.Array, v: jax.Array, chunk: Chunk, codec: Codec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pages that filled up in a chunk: uint32[E, B, K, words], and the slots they stand in.

    With int32[E, B, K], the block of each, -1 for none; and int32[B, K, T], see `pages_in`.
    """
    slot_page = pages_in(v, chunk.before)
    keys, block = keys_in_slots(k, slot_page, chunk.filled_page, chunk.filled_block)
    values = values_in_slots(v, slot_page, chunk.filled_page)
    return codec.encode(keys, values), block, slot_page
