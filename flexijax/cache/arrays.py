"""What the head groups of every kind are given: where a step, a chunk or a prompt stands."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.layout import CacheSizes, GroupProgram
from flexijax.cache.over_mesh import heads_in
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.filled import filled_pages, in_full_pages
from flexijax.policies.base import PolicyState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step."""

    block_table: jax.Array  # int32[B, P], block of each page
    held: jax.Array  # int32[B], tokens held before this step; -1: the request takes no part
    summarized: jax.Array  # int32[B], tokens of the pages that have a summary

    @property
    def active(self) -> jax.Array:
        """bool[B], requests that take part."""
        return self.held >= 0

    @property
    def lengths(self) -> jax.Array:
        """int32[B], tokens with that of this step; 0 of requests that take no part."""
        return self.held + 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkEnd:
    """Where a batch stands at the end of a chunk of R decode steps of some of its rows.

    Nothing is chosen for rows whose chunk does not end here, or that have ended themselves. All of
    it is the same in every layer, so it is worked out once, see `chunk_end`.
    """

    block_table: jax.Array  # int32[B, P]
    before: jax.Array  # int32[B], tokens held before the chunk; `held` where it does not end here
    held: jax.Array  # int32[B], after it
    lengths: jax.Array  # int32[B], the same; 0 for rows of which nothing is chosen
    active: jax.Array  # bool[B], the other rows
    summarized: jax.Array  # int32[B], tokens of `lengths` that lie in full pages
    filled_page: jax.Array  # int32[B, E], pages that filled up, those of the ended too; -1: none
    filled_block: jax.Array  # int32[B, E], the block of each, -1 for none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunk(ChunkEnd):
    """What one group needs at the end of R decode steps."""

    layer: jax.Array  # int32[]
    queries: jax.Array | None  # [W, B, K, G, H], the group's last W; None where it wants none


@heads_in(k=0, v=0, queries=1, observed=0)
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that has been read, as one group needs it. S: the most tokens of a request."""

    k: jax.Array  # [K, H, S]
    v: jax.Array  # [K, S, H]
    queries: jax.Array  # [W, K, G, H], of its last W tokens, at least one
    observed: Any  # PolicyState of leaves [K, ...] where every query was observed, else ()
    row: jax.Array  # int32[], its place in the batch
    blocks: jax.Array  # int32[P], block of each page, good below ceil(length / page)
    length: jax.Array  # int32[]
    start: jax.Array  # int32[], tokens whose pages the blocks hold already
    layer: jax.Array  # int32[]


def chunk_end(
    sizes: CacheSizes,
    block_table: jax.Array,
    settled: jax.Array,
    held: jax.Array,
    due: jax.Array,
    active: jax.Array,
) -> ChunkEnd:
    """Where rows that held `settled` tokens at their last chunk's end stand now, at `held`.

    settled, held: int32[B]. block_table: int32[B, P]. due: bool[B], rows whose chunk ends. active:
    bool[B], rows that go on.
    """
    before, active = jnp.where(due, settled, held), due & active
    most = -(-sizes.chunk_steps // sizes.page_size)
    page = filled_pages(before, held, page_size=sizes.page_size, count=most)
    block = jnp.take_along_axis(block_table, jnp.maximum(page, 0), axis=1, mode="clip")
    lengths = jnp.where(active, held, 0)
    return ChunkEnd(
        block_table=block_table,
        before=before,
        held=held,
        lengths=lengths,
        active=active,
        summarized=in_full_pages(lengths, sizes.page_size),
        filled_page=page,
        filled_block=jnp.where(page >= 0, block, -1),
    )


def zeros(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """In device memory."""
    return jnp.zeros(shape, dtype, device=platform.sharding())


def empty_state(
    program: GroupProgram, heads: int, tokens: int, batch: int | None = None
) -> PolicyState:
    """What the policy remembers of every head before anything was seen: leaves [B, K, ...]."""
    shape = (program.sizes.batch if batch is None else batch, heads)
    state = program.policy.init_state(tokens)
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (*shape, *jnp.shape(leaf))).copy(), state
    )


def set_row(leaf: jax.Array, row: jax.Array, value: jax.Array) -> jax.Array:
    """leaf [B, ...] with value [...] at `row`, in place when the leaf is donated."""
    return lax.dynamic_update_slice_in_dim(leaf, value[None].astype(leaf.dtype), row, axis=0)


def replaced(items: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    """The items with another value at `index`."""
    return (*items[:index], value, *items[index + 1 :])
