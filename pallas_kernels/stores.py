"""Where the keys and values of a layer's heads lie, as decode attention is given them."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexijax.pallas_kernels.filled import find_slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageStore:
    """Pages in a pool, found through a block table; some of them are attended.

    The page of the new token must be among `pages`.
    """

    k: jax.Array  # [blocks, K, page, H]
    v: jax.Array  # [blocks, K, page, H]
    pages: jax.Array  # int32[B, K, n], pages of the request that are attended, -1 for none
    block_table: jax.Array  # int32[B, P]
    held: jax.Array  # int32[B], tokens before the new one; -1: the row takes no part
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the model

    @property
    def page_size(self) -> int:
        """Tokens."""
        return self.k.shape[2]

    def append(self, k: jax.Array, v: jax.Array) -> PageStore:
        """With the new token of each row that takes part: k, v [B, K, H]."""
        page, offset = _place(self.held, self.page_size)
        block = jnp.take_along_axis(self.block_table, page[:, None], axis=1, mode="clip")[:, 0]
        block = jnp.where(self.held >= 0, block, self.k.shape[0])  # out of bounds: dropped
        return dataclasses.replace(
            self,
            k=self.k.at[block, :, offset].set(k, mode="drop"),
            v=self.v.at[block, :, offset].set(v, mode="drop"),
        )

    def listed(self) -> tuple[jax.Array, jax.Array]:
        """Block ids and token counts int32[B, K, n], the new token counted; -1 and 0 for none."""
        ids = jnp.take_along_axis(self.block_table[:, None], jnp.maximum(self.pages, 0), axis=2)
        counts = self.held[:, None, None] + 1 - self.pages * self.page_size
        listed = self.pages >= 0
        counts = jnp.where(listed, jnp.clip(counts, 0, self.page_size), 0)
        return jnp.where(listed, ids, -1), counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotStore:
    """Slots of a head's own, all attended; keys stand with the channel before the token."""

    k: jax.Array  # [B, K, H, S, page]
    v: jax.Array  # [B, K, S, page, H]
    slot_page: jax.Array | None  # int32[B, K, S], the page in each slot, -1 empty; None: page s
    held: jax.Array  # int32[B] or, where slot_page is None, int32[B, K]: see `PageStore`
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the model

    @property
    def page_size(self) -> int:
        """Tokens."""
        return self.k.shape[4]

    def append(self, k: jax.Array, v: jax.Array) -> SlotStore:
        """With the new token of each row that takes part: k, v [B, K, H]."""
        slot, offset = _slots(self.slot_page, self.held, self.v.shape[:3], self.page_size)
        k, v = _with_tokens(self.k, self.v, slot, offset, k, v)
        return dataclasses.replace(self, k=k, v=v)

    def counts(self) -> jax.Array:
        """Token counts int32[B, K, S], the new token counted; 0 for an empty slot."""
        return _counts(self.slot_page, self.held, self.v.shape[:3], self.page_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BankedStore:
    """As a `SlotStore` whose keys and values lie apart, of b rows in each array."""

    k: tuple[jax.Array, ...]  # [b, K, H, S, page]
    v: tuple[jax.Array, ...]  # [b, K, S, page, H]
    slot_page: jax.Array | None  # of all rows
    held: jax.Array
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the model

    @property
    def page_size(self) -> int:
        """Tokens."""
        return self.k[0].shape[4]

    def append(self, k: jax.Array, v: jax.Array) -> BankedStore:
        """With the new token of each row that takes part: k, v [B, K, H]."""
        slot, offset = _slots(self.slot_page, self.held, self._shape, self.page_size)
        banks = (jnp.split(x, len(self.k)) for x in (slot, offset, k, v))
        made = list(map(_with_tokens, self.k, self.v, *banks))
        return dataclasses.replace(self, k=tuple(k for k, _ in made), v=tuple(v for _, v in made))

    def counts(self) -> jax.Array:
        """Token counts int32[B, K, S], the new token counted; 0 for an empty slot."""
        return _counts(self.slot_page, self.held, self._shape, self.page_size)

    @property
    def _shape(self) -> tuple[int, ...]:
        rows, *others = self.v[0].shape[:3]
        return (rows * len(self.v), *others)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedStore:
    """As a `PageStore` whose full pages are coded; the others stand in a tail of a few slots.

    Values are rotated in both, and so is that of the new token: see
    `page_codes/xla.py`.
    """

    codes: jax.Array  # uint32[blocks, K, words]
    tail: SlotStore  # all of it is attended
    pages: jax.Array  # int32[B, K, n], as of a `PageStore`; those in the tail are passed over
    block_table: jax.Array  # int32[B, P]
    coded: jax.Array  # int32[B], tokens in coded pages; others stand in the tail
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the model
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def page_size(self) -> int:
        """Tokens."""
        return self.tail.page_size

    def append(self, k: jax.Array, v: jax.Array) -> CodedStore:
        """With the new token of each row that takes part: k, v [B, K, H]."""
        return dataclasses.replace(self, tail=self.tail.append(k, v))

    def listed(self) -> jax.Array:
        """Block ids int32[B, K, n] of the coded pages that are attended, -1 for none."""
        ids = jnp.take_along_axis(self.block_table[:, None], jnp.maximum(self.pages, 0), axis=2)
        listed = (self.pages >= 0) & (self.pages * self.page_size < self.coded[:, None, None])
        return jnp.where(listed, ids, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedSlotStore:
    """As a `SlotStore` whose full pages are coded; the others stand in a tail, see `CodedStore`."""

    slots: tuple[jax.Array, ...]  # uint32[b, K, S, words], of b rows each
    slot_page: jax.Array  # int32[B, K, S], the page in each slot, -1 empty
    tail: SlotStore
    coded: jax.Array  # int32[B], tokens in coded pages; slots of others are passed over
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the model
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def page_size(self) -> int:
        """Tokens."""
        return self.tail.page_size

    def append(self, k: jax.Array, v: jax.Array) -> CodedSlotStore:
        """With the new token of each row that takes part: k, v [B, K, H]."""
        return dataclasses.replace(self, tail=self.tail.append(k, v))

    def counts(self) -> jax.Array:
        """Token counts int32[B, K, S] of coded pages; 0 for an empty slot, and in free rows."""
        coded = jnp.where(self.tail.held >= 0, self.coded, 0)[:, None, None]
        there = (self.slot_page >= 0) & (self.slot_page * self.page_size < coded)
        return jnp.where(there, self.page_size, 0)


# What any implementation takes, and what XLA's does.
Store: TypeAlias = PageStore | SlotStore
AnyStore: TypeAlias = Store | BankedStore | CodedStore | CodedSlotStore


def of_heads(x: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    """x [B, K, ...] of the wanted heads; in slices, which XLA fuses where it would not a gather."""
    if wanted == tuple(range(x.shape[1])):
        return x
    return jnp.stack([x[:, head] for head in wanted], axis=1)


def _place(held: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Page and offset of the next token. No // and %: 18 instructions more in every layer."""
    held = jnp.maximum(held, 0)
    return lax.div(held, page_size), lax.rem(held, page_size)


def _of_heads(held: jax.Array) -> jax.Array:
    return held[:, None] if held.ndim == 1 else held


def _slots(
    slot_page: jax.Array | None, held: jax.Array, shape: tuple[int, ...], page_size: int
) -> tuple[jax.Array, jax.Array]:
    """Slot and offset int32[B, K] of the new token; shape: B, K, S. Out of bounds to be dropped."""
    held = jnp.broadcast_to(_of_heads(held), shape[:2])
    page, offset = _place(held, page_size)
    slot = page
    if slot_page is not None:
        slot = find_slots(slot_page, page[:, :1])[:, :, 0]
    return jnp.where((held >= 0) & (slot >= 0), slot, shape[2]), offset


def _with_tokens(
    k_slots: jax.Array,
    v_slots: jax.Array,
    slot: jax.Array,
    offset: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The slots with tokens k, v [B, K, H] at slots and offsets int32[B, K]."""
    row, head = (index.ravel() for index in np.indices(slot.shape))
    slot, offset = slot.ravel(), offset.ravel()
    k, v = (x.reshape(len(slot), -1) for x in (k, v))
    if len(slot) == 1:
        # XLA makes something else of a scatter of one update, and for that copies the slots, thrice
        # on a CPU. So there are two, of which one is dropped.
        row, head = row.repeat(2), head.repeat(2)
        slot, offset = jnp.append(slot, v_slots.shape[2]), jnp.append(offset, 0)
        k, v = (jnp.concatenate([x, x]) for x in (k, v))
    return (
        k_slots.at[row, head, :, slot, offset].set(k, mode="drop"),
        v_slots.at[row, head, slot, offset].set(v, mode="drop"),
    )


def _counts(
    slot_page: jax.Array | None, held: jax.Array, shape: tuple[int, ...], page_size: int
) -> jax.Array:
    """int32[B, K, S]; shape: the same."""
    page = slot_page
    if page is None:
        page = jnp.arange(shape[2], dtype=jnp.int32)[None, None]
    counts = jnp.clip(_of_heads(held)[..., None] + 1 - page * page_size, 0, page_size)
    return jnp.broadcast_to(jnp.where(page < 0, 0, counts), shape)
