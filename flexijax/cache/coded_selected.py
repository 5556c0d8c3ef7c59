"""Selected head groups whose full pages are coded: see `selected.py`, and `Codec`.

Pages that are not full when a chunk begins stand in a tail, see `tail.py`. At the end of the chunk
those that filled up are coded, once, into their block. Values are rotated: see `coded.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, Prompt, Step, set_row
from flexijax.cache.layout import GroupProgram
from flexijax.cache.selected import attended_pages, with_summaries
from flexijax.cache.tail import begun, coded_pages, empty_tail, store_of
from flexijax.pallas_kernels.filled import set_rows
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.stores import CodedStore
from flexijax.policies.codec import Codec, rotate
from flexijax.policies.page_score import FilledPages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedGroup:
    """Pages lie by block once they are coded, and until then in the tail."""

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
    k, v = empty_tail(sizes, heads)
    group = CodedGroup(
        codes=_codec(program).empty(sizes.blocks, heads, sizes.page),
        k=k,
        v=v,
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
    if pages is None:
        pages = attended_pages(program, group, q, step)
    tail = store_of(group.k, group.v, step.summarized, step.held, heads)
    bits = _codec(program).bits
    return CodedStore(group.codes, tail, pages, step.block_table, step.summarized, heads, bits)


def after_step(group: CodedGroup, store: CodedStore, step: Step) -> CodedGroup:
    """The group with the token in it."""
    return dataclasses.replace(group, k=store.tail.k, v=store.tail.v)


def commit(
    program: GroupProgram, group: CodedGroup, host: None, stats: None, prompt: Prompt
) -> tuple[CodedGroup, None, None]:
    """A prompt's full pages into their blocks, coded; the begun one into the tail."""
    sizes, codec = program.sizes, _codec(program)
    heads = prompt.k.shape[0]
    page = jnp.arange(sizes.pages, dtype=jnp.int32)
    full = lax.div(prompt.length, sizes.page_size)
    table = jnp.where(page < full, prompt.blocks, sizes.blocks)  # others: out of bounds, dropped
    k = prompt.k.reshape(heads, -1, sizes.pages, sizes.page_size)
    v = rotate(prompt.v).reshape(heads, sizes.pages, sizes.page_size, -1)
    k_pages = k.transpose(2, 0, 3, 1)  # [P, K, page, H]
    coded = codec.encode(k_pages, v.swapaxes(0, 1))
    k_tail, v_tail = begun(k, v, full, group.v.shape[2])
    group = dataclasses.replace(
        group,
        codes=group.codes.at[table].set(coded, mode="drop"),
        k=set_row(group.k, prompt.row, k_tail),
        v=set_row(group.v, prompt.row, v_tail),
    )
    return with_summaries(program, group, k_pages, table, prompt), None, None


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
    score = program.group.score
    made, block, slot_page = coded_pages(group.k, group.v, chunk, _codec(program))
    codes = set_rows(group.codes, block, made)
    summaries = group.summaries
    if score is not None:
        summaries = score.update(
            summaries,
            group.score_state,
            FilledPages(group.k, slot_page, chunk.filled_page, chunk.filled_block),
            implementation=program.implementation,
        )
    return dataclasses.replace(group, codes=codes, summaries=summaries), None, None


def _codec(program: GroupProgram) -> Codec:
    assert program.group.codec is not None
    return program.group.codec
