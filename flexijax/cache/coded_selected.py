"""Selected head groups whose full pages are coded: see `selected.py`, and `Codec`.

Pages that are not full when a chunk begins stand in the tail, a few pages of each head's own in the
cache's dtype. At the end of the chunk those that filled up are coded, once, into their block.
Values are rotated, in the tail too: see `coded.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, Prompt, Step, set_row, zeros
from flexijax.cache.layout import GroupProgram, tail_pages
from flexijax.cache.selected import choose_pages, scatter
from flexijax.pallas_kernels.filled import keys_in_slots, set_rows, values_in_slots
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.stores import CodedStore, SlotStore
from flexijax.policies.codec import Codec, rotate
from flexijax.policies.page_score import FilledPages, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedGroup:
    """Page p stands in slot p % T of the tail until it is coded, and from then on in its block."""

    BY_BLOCK: ClassVar[tuple[str, ...]] = ("codes", "summaries", "first")
    READ: ClassVar[tuple[str, ...]] = ("codes", "summaries", "score_state", "first")
    WRITTEN: ClassVar[tuple[str, ...]] = ("k", "v")

    codes: jax.Array  # uint32[blocks, K, words]
    k: jax.Array  # [B, K, H, T, page]
    v: jax.Array  # [B, K, T, page, H]
    summaries: Any  # leaves [blocks, K, ...]
    score_state: Any  # leaves [B, K, ...]
    first: jax.Array | None = None  # None: over a mesh pages are not coded


def empty(program: GroupProgram, heads: int) -> tuple[CodedGroup, None]:
    """A group of so many heads that holds nothing; it has no statistics."""
    sizes, score = program.sizes, program.group.score
    batch, page, width, tail = sizes.batch, sizes.page_size, sizes.shape.head_dim, tail_pages(sizes)
    group = CodedGroup(
        codes=_codec(program).empty(sizes.blocks, heads, sizes.page),
        k=zeros((batch, heads, width, tail, page), sizes.dtype),
        v=zeros((batch, heads, tail, page, width), sizes.dtype),
        summaries=() if score is None else score.empty(sizes.blocks, heads, sizes.page),
        score_state=() if score is None else score.empty_state(sizes.batch, heads, sizes.page),
    )
    return group, None


def store(
    program: GroupProgram,
    group: CodedGroup,
    heads: tuple[int, ...],
    q: HeadQueries,
    step: Step,
    pages: jax.Array | None = None,
) -> CodedStore:
    """Where a token's key and value go, and what is attended; as of `selected`."""
    sizes = program.sizes
    if pages is None:
        assert program.group.attends is not None
        pages = choose_pages(
            program,
            q,
            group.summaries,
            group.score_state,
            PageTable(step.block_table, step.lengths, step.summarized, sizes.page_size),
            count=program.group.attends,
            newer=-(-sizes.chunk_steps // sizes.page_size),
        )
    slot_page = _slot_page(group, step.summarized, sizes.page_size)
    tail = SlotStore(group.k, group.v, slot_page, step.held, heads)
    bits = _codec(program).bits
    return CodedStore(group.codes, tail, pages, step.block_table, step.summarized, heads, bits)


def after_step(group: CodedGroup, store: CodedStore, step: Step) -> CodedGroup:
    """The group with the token in it."""
    return dataclasses.replace(group, k=store.tail.k, v=store.tail.v)


def commit(
    program: GroupProgram, group: CodedGroup, host: None, stats: None, prompt: Prompt
) -> tuple[CodedGroup, None, None]:
    """A prompt's full pages into their blocks, coded; the begun one into the tail."""
    sizes, score, codec = program.sizes, program.group.score, _codec(program)
    heads = prompt.k.shape[0]
    page = jnp.arange(sizes.pages, dtype=jnp.int32)
    full = lax.div(prompt.length, sizes.page_size)
    table = jnp.where(page < full, prompt.blocks, sizes.blocks)  # others: out of bounds, dropped
    k = prompt.k.reshape(heads, -1, sizes.pages, sizes.page_size)
    v = rotate(prompt.v).reshape(heads, sizes.pages, sizes.page_size, -1)
    k_pages = k.transpose(2, 0, 3, 1)  # [P, K, page, H]
    coded = codec.encode(k_pages, v.swapaxes(0, 1))
    slot = jnp.arange(group.v.shape[2], dtype=jnp.int32)
    begun = (slot == lax.rem(full, len(slot)))[:, None, None]  # [T, 1, 1]
    k_tail = lax.dynamic_slice_in_dim(k, full, 1, axis=2)  # [K, H, 1, page]
    v_tail = lax.dynamic_slice_in_dim(v, full, 1, axis=1)  # [K, 1, page, H]
    group = dataclasses.replace(
        group,
        codes=group.codes.at[table].set(coded, mode="drop"),
        k=set_row(group.k, prompt.row, jnp.where(begun[:, :, 0], k_tail, 0)),
        v=set_row(group.v, prompt.row, jnp.where(begun, v_tail, 0)),
    )
    if score is not None:
        state = score.fit(k_pages, prompt.length)
        group = dataclasses.replace(
            group,
            summaries=scatter(group.summaries, table, score.summarize(k_pages, state)),
            score_state=scatter(group.score_state, prompt.row, state),
        )
    return group, None, None


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for: none, it chooses nothing."""
    return 0


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do: pages to code."""
    return True


def end_chunk(
    program: GroupProgram, group: CodedGroup, host: None, stats: None, chunk: Chunk
) -> tuple[CodedGroup, None, None]:
    """Codes and summarises the pages that filled up, those of requests that ended too."""
    sizes, score = program.sizes, program.group.score
    slot_page = _slot_page(group, chunk.before, sizes.page_size)
    filled = (slot_page, chunk.filled_page, chunk.filled_block)
    keys, block = keys_in_slots(group.k, *filled)
    values = values_in_slots(group.v, slot_page, chunk.filled_page)
    codes = set_rows(group.codes, block, _codec(program).encode(keys, values))
    summaries = group.summaries
    if score is not None:
        summaries = score.update(
            summaries,
            group.score_state,
            FilledPages(group.k, *filled),
            implementation=program.implementation,
        )
    return dataclasses.replace(group, codes=codes, summaries=summaries), None, None


def _codec(program: GroupProgram) -> Codec:
    assert program.group.codec is not None
    return program.group.codec


def _slot_page(group: CodedGroup, coded: jax.Array, page_size: int) -> jax.Array:
    """int32[B, K, T]: the page in each slot of the tail, where int32[B] tokens are coded.

    The first that is not coded, and those that follow it, begun or not.
    """
    batch, heads, tail = group.v.shape[:3]
    first = lax.div(coded, page_size)[:, None]
    slot = jnp.arange(tail, dtype=jnp.int32)
    page = first + lax.rem(slot - lax.rem(first, tail) + tail, tail)
    return jnp.broadcast_to(page[:, None], (batch, heads, tail))
