"""Where the keys and values of a layer's heads lie, as decode attention is given them."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
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
        batch, heads, slots = self.v.shape[:3]
        held = jnp.broadcast_to(self._of_heads(), (batch, heads))
        page, offset = _place(held, self.page_size)
        slot = page
        if self.slot_page is not None:
            slot = find_slots(self.slot_page, page[:, :1])[:, :, 0]
        slot = jnp.where((held >= 0) & (slot >= 0), slot, slots)  # out of bounds: dropped
        row, head = jnp.arange(batch)[:, None], jnp.arange(heads)[None, :]
        return dataclasses.replace(
            self,
            k=self.k.at[row, head, :, slot, offset].set(k, mode="drop"),
            v=self.v.at[row, head, slot, offset].set(v, mode="drop"),
        )

    def counts(self) -> jax.Array:
        """Token counts int32[B, K, S], the new token counted; 0 for an empty slot."""
        shape = self.v.shape[:3]
        page = self.slot_page
        if page is None:
            page = jnp.arange(shape[2], dtype=jnp.int32)[None, None]
        counts = jnp.clip(
            self._of_heads()[..., None] + 1 - page * self.page_size, 0, self.page_size
        )
        return jnp.broadcast_to(jnp.where(page < 0, 0, counts), shape)

    def _of_heads(self) -> jax.Array:
        return self.held[:, None] if self.held.ndim == 1 else self.held


Store: TypeAlias = PageStore | SlotStore


def of_heads(x: jax.Array, wanted: tuple[int, ...]) -> jax.Array:
    """x [B, K, ...] of the wanted heads; in slices, which XLA fuses where it would not a gather."""
    if wanted == tuple(range(x.shape[1])):
        return x
    return jnp.stack([x[:, head] for head in wanted], axis=1)


def _place(held: jax.Array, page_size: int) -> tuple[jax.Array, jax.Array]:
    """Page and offset of the next token. No // and %: 18 instructions more in every layer."""
    held = jnp.maximum(held, 0)
    return lax.div(held, page_size), lax.rem(held, page_size)
