"""The host tier of a head group in codes, and moves between it and slots, coded or not.

What moves is a page's row of words. Slots that are not coded hold what the codes stand for, in the
cache's dtype, from the moment on at which a page has been coded: so it makes no difference whether
a page stayed on the device or came back. Moves are `staged`: see `tiers.py`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.staging import entries, to_device, to_host, to_host_index
from flexijax.pallas_kernels.filled import find_slots
from flexijax.policies.codec import Codec
from flexijax.policies.page_score import PageShape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedHost:
    """Every full page of its heads, in pinned host memory; values are rotated."""

    words: jax.Array  # uint32[blocks, K, words]
    codec: Codec = dataclasses.field(metadata={"static": True})
    page: PageShape = dataclasses.field(metadata={"static": True})


def promote(
    slots_k: jax.Array, slots_v: jax.Array, host: CodedHost, load_block: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pages from the host into device slots; arrays as `tiers.promote`."""
    moves, count = entries(load_block)

    def move(i: jax.Array, slots: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row, head, slot = (of[i] for of in moves)
        at = to_host_index((load_block[row, head, slot], head, 0))
        words = to_device(lax.dynamic_slice(host.words, at, (1, 1, host.words.shape[2])))
        return _set_slot(slots, (row, head, slot), host.codec.decode(words, host.page))

    return lax.fori_loop(0, count, move, (slots_k, slots_v))


def offload_pages(
    host: CodedHost,
    slots_k: jax.Array,
    slots_v: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> tuple[CodedHost, jax.Array, jax.Array]:
    """Codes pages that filled up in slots: as `tiers.offload_pages`, and returns the slots too.

    There the pages are replaced by what their codes stand for.
    """
    slot_of = jnp.where(block[:, None] >= 0, find_slots(slot_page, page), -1)  # [B, K, E]
    moves, count = entries(slot_of)
    size, width = host.page.page_size, host.page.head_dim

    def move(
        i: jax.Array, made: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        row, head, entry = (of[i] for of in moves)
        slot = slot_of[row, head, entry]
        k = lax.dynamic_slice(made[1], (row, head, 0, slot, 0), (1, 1, width, 1, size))
        v = lax.dynamic_slice(made[2], (row, head, slot, 0, 0), (1, 1, 1, size, width))
        words = host.codec.encode(k[:, :, :, 0].swapaxes(-1, -2), v[:, :, 0])
        at = to_host_index((block[row, entry], head, 0))
        pool = lax.dynamic_update_slice(made[0], to_host(words), at)
        stands = host.codec.decode(words, host.page)
        return (pool, *_set_slot(made[1:], (row, head, slot), stands))

    words, slots_k, slots_v = lax.fori_loop(0, count, move, (host.words, slots_k, slots_v))
    return dataclasses.replace(host, words=words), slots_k, slots_v


def commit_pages(
    host: CodedHost, k: jax.Array, v: jax.Array, block: jax.Array
) -> tuple[CodedHost, jax.Array, jax.Array]:
    """A prompt's full pages to the host; k, v as they are then to be kept on the device.

    k [K, H, P, page], v [K, P, page, H], values rotated. block: int32[P], -1 for pages that are not
    full, which come back as they are.
    """
    words = host.codec.encode(k.transpose(2, 0, 3, 1), v.swapaxes(0, 1))  # [P, K, words]
    host = offload_words(host, words[:, None], block[:, None, None])
    coded_k, coded_v = host.codec.decode(words, host.page)  # [P, K, page, H]
    full = (block >= 0)[:, None]
    k = jnp.where(full, coded_k.transpose(1, 3, 0, 2), k)
    v = jnp.where(full[..., None], coded_v.swapaxes(0, 1), v)
    return host, k, v


def offload_words(host: CodedHost, words: jax.Array, block: jax.Array) -> CodedHost:
    """Coded pages [E, B, K, words] into blocks int32[E, B, K or 1], -1 for none."""
    block = jnp.broadcast_to(block, words.shape[:3])
    moves, count = entries(block)

    def move(i: jax.Array, pool: jax.Array) -> jax.Array:
        at = entry, row, head = tuple(of[i] for of in moves)
        one = lax.dynamic_slice(words, (*at, 0), (1, 1, 1, words.shape[3]))[0]
        to = to_host_index((block[entry, row, head], head, 0))
        return lax.dynamic_update_slice(pool, to_host(one), to)

    return dataclasses.replace(host, words=lax.fori_loop(0, count, move, host.words))


def promote_words(slots: jax.Array, host: CodedHost, load_block: jax.Array) -> jax.Array:
    """Pages from the host into coded slots uint32[B, K, S, words]; load_block: as of `promote`."""
    moves, count = entries(load_block)

    def move(i: jax.Array, slots: jax.Array) -> jax.Array:
        row, head, slot = (of[i] for of in moves)
        at = to_host_index((load_block[row, head, slot], head, 0))
        words = to_device(lax.dynamic_slice(host.words, at, (1, 1, host.words.shape[2])))
        return lax.dynamic_update_slice(slots, words[None], (row, head, slot, 0))

    return lax.fori_loop(0, count, move, slots)


def _set_slot(
    slots: tuple[jax.Array, jax.Array],
    at: tuple[jax.Array, jax.Array, jax.Array],
    page: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Slots k [B, K, H, S, page], v [B, K, S, page, H] with a page k, v [1, 1, page, H] in one."""
    row, head, slot = at
    k = page[0].swapaxes(-1, -2)[:, :, :, None]
    return (
        lax.dynamic_update_slice(slots[0], k, (row, head, 0, slot, 0)),
        lax.dynamic_update_slice(slots[1], page[1][:, :, None], (row, head, slot, 0, 0)),
    )
