"""Pages that filled up: which they are, their keys where they lie, and rows written for them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def filled_pages(before: jax.Array, after: jax.Array, *, page_size: int, count: int) -> jax.Array:
    """int32[B, count]: the pages that filled up while lengths int32[B] grew, -1 for none."""
    page = lax.div(before, page_size)[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    return jnp.where(page < lax.div(after, page_size)[:, None], page, -1)


def in_full_pages(lengths: jax.Array, page_size: int) -> jax.Array:
    """int32[B]: how many of the tokens int32[B] lie in full pages."""
    return lengths - lax.rem(lengths, page_size)


def find_slots(slot_page: jax.Array, pages: jax.Array) -> jax.Array:
    """int32[B, K, n]: the slot that holds each of the pages int32[B, n], -1 where none does.

    slot_page: int32[B, K, S], -1 for an empty slot; a page of -1 is in none.
    """
    match = (slot_page[..., None] == pages[:, None, None]) & (pages >= 0)[:, None, None]
    slot = jnp.arange(slot_page.shape[-1], dtype=jnp.int32)[:, None]
    return jnp.max(jnp.where(match, slot, -1), axis=2)


def keys_in_blocks(k_pages: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys [E, B, K, page, H] of the blocks int32[B, E] of a pool [blocks, K, page, H].

    With int32[E, B, K], for `set_rows`: those blocks, -1 for none, of which the keys are any.
    """
    keys = jnp.take(k_pages, jnp.maximum(block.T, 0), axis=0, mode="clip")
    return keys, jnp.broadcast_to(block.T[..., None], keys.shape[:3])


def keys_in_slots(
    k_slots: jax.Array, slot_page: jax.Array, page: jax.Array, block: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Keys [E, B, K, page, H] of the pages int32[B, E] in slots [B, K, H, S, page].

    slot_page: int32[B, K, S]. block: int32[B, E], of each page, -1 for none. With int32[E, B, K],
    for `set_rows`: the blocks, -1 also for a page that is in no slot of a head.
    """
    slot = find_slots(slot_page, page)  # [B, K, E]
    source = jnp.maximum(slot, 0)[:, :, None, :, None]
    keys = jnp.take_along_axis(k_slots, source, axis=3).transpose(3, 0, 1, 4, 2)
    return keys, jnp.where(slot >= 0, block[:, None], -1).transpose(2, 0, 1)


def values_in_slots(v_slots: jax.Array, slot_page: jax.Array, page: jax.Array) -> jax.Array:
    """Values [E, B, K, page, H] of the pages int32[B, E] in slots [B, K, S, page, H].

    slot_page: int32[B, K, S]. What stands for a page in no slot of a head is any other's.
    """
    source = jnp.maximum(find_slots(slot_page, page), 0)[..., None, None]
    return jnp.take_along_axis(v_slots, source, axis=2).transpose(2, 0, 1, 3, 4)


def set_rows(pools: Any, block: jax.Array, rows: Any) -> Any:
    """Leaves [blocks, K, ...] with rows [E, B, K, ...] at block int32[E, B, K], -1 for none."""
    head = jnp.arange(block.shape[2])

    def written(pool: jax.Array, new: jax.Array) -> jax.Array:
        at = jnp.where(
            block < 0, pool.shape[0], block
        )  # out of bounds: dropped, where -1 would wrap
        return pool.at[at, head].set(new, mode="drop")

    return jax.tree.map(written, pools, rows)
