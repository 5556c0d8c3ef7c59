"""Offloaded head groups coded in both tiers: see `offloaded.py`, and `Codec`.

Slots and host pages hold the same words, and what crosses between them is words. A page that has
begun has a slot as any other, which is not read before the page is coded: until then it stands in a
tail, see `tail.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, Prompt, Step, set_row
from flexijax.cache.coded_host import CodedHost, offload_words, promote_words
from flexijax.cache.layout import GroupProgram
from flexijax.cache.offloaded import (
    RerankSchedule,
    empty_schedule,
    empty_stats,
    first_plan,
    first_schedule,
    next_plan,
)
from flexijax.cache.selected import scatter
from flexijax.cache.tail import begun, coded_pages, empty_tail, store_of
from flexijax.pallas_kernels.filled import find_slots
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.rerank import RerankStats
from flexijax.pallas_kernels.stores import CodedSlotStore
from flexijax.policies.codec import Codec, rotate
from flexijax.policies.page_score import FilledPages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedOffloadedGroup:
    """As an `OffloadedGroup`, whose full pages are coded; k and v are of the tail."""

    BY_BLOCK: ClassVar[tuple[str, ...]] = ("summaries", "first")
    READ: ClassVar[tuple[str, ...]] = ("slots", "slot_page", "first")
    WRITTEN: ClassVar[tuple[str, ...]] = ("k", "v")

    slots: jax.Array  # uint32[B, K, S, words]
    slot_page: jax.Array  # int32[B, K, S], logical page in each slot, -1 empty
    k: jax.Array  # [B, K, H, T, page]
    v: jax.Array  # [B, K, T, page, H]
    summaries: Any  # leaves [blocks, K, ...]
    score_state: Any  # leaves [B, K, ...]
    schedule: RerankSchedule | None  # None: all are reranked after every chunk
    first: jax.Array | None = None  # None: over a mesh pages are not coded


def empty(program: GroupProgram, heads: int) -> tuple[CodedOffloadedGroup, RerankStats]:
    """A group of so many heads that holds nothing, and its statistics; the host tier is apart."""
    sizes, slots, score = program.sizes, program.slots, program.score
    k, v = empty_tail(sizes, heads)
    words = _codec(program).empty(sizes.batch * heads, slots, sizes.page)
    group = CodedOffloadedGroup(
        slots=words.reshape(sizes.batch, heads, *words.shape[1:]),
        slot_page=jnp.full((sizes.batch, heads, slots), -1, jnp.int32),
        k=k,
        v=v,
        summaries=score.empty(sizes.blocks, heads, sizes.page),
        score_state=score.empty_state(sizes.batch, heads, sizes.page),
        schedule=empty_schedule(program, heads),
    )
    return group, empty_stats(program, heads)


def store(
    program: GroupProgram,
    group: CodedOffloadedGroup,
    heads: tuple[int, ...],
    q: HeadQueries,
    step: Step,
) -> CodedSlotStore:
    """Where a token's key and value go, and what is attended: whatever is held."""
    tail = store_of(group.k, group.v, step.summarized, step.held, heads)
    bits = _codec(program).bits
    return CodedSlotStore((group.slots,), group.slot_page, tail, step.summarized, heads, bits)


def after_step(group: CodedOffloadedGroup, store: CodedSlotStore, step: Step) -> Any:
    """The group with the token in it."""
    return dataclasses.replace(group, k=store.tail.k, v=store.tail.v)


def commit(
    program: GroupProgram,
    group: CodedOffloadedGroup,
    host: CodedHost,
    stats: RerankStats,
    prompt: Prompt,
) -> tuple[CodedOffloadedGroup, CodedHost, RerankStats]:
    """Full pages of a prompt to the host; the chosen ones straight into slots; one to the tail."""
    sizes, score, codec = program.sizes, program.score, _codec(program)
    heads, row = prompt.k.shape[0], prompt.row
    k = prompt.k.reshape(heads, -1, sizes.pages, sizes.page_size)
    v = rotate(prompt.v).reshape(heads, sizes.pages, sizes.page_size, -1)
    page = jnp.arange(sizes.pages, dtype=jnp.int32)
    count = lax.div(prompt.length, sizes.page_size)
    full = jnp.where(page < count, prompt.blocks, -1)
    k_pages = k.transpose(2, 0, 3, 1)  # [P, K, page, H]
    words = codec.encode(k_pages, v.swapaxes(0, 1))  # [P, K, words]
    host = offload_words(host, words[:, None], full[:, None, None])
    state = score.fit(k_pages, prompt.length)
    at = jnp.where(full >= 0, full, sizes.blocks)
    summaries = scatter(group.summaries, at, score.summarize(k_pages, state))
    plan = first_plan(program, prompt, summaries, state, full)
    # Of a slot that is empty, or whose page is not full, the words are never read.
    source = jnp.maximum(plan.slot_page[0], 0)[..., None]
    mine = jnp.take_along_axis(words.swapaxes(0, 1), source, axis=1)
    k_tail, v_tail = begun(k, v, count, group.v.shape[2])
    group = CodedOffloadedGroup(
        slots=set_row(group.slots, row, mine),
        slot_page=set_row(group.slot_page, row, plan.slot_page[0]),
        k=set_row(group.k, row, k_tail),
        v=set_row(group.v, row, v_tail),
        summaries=summaries,
        score_state=scatter(group.score_state, row, state),
        schedule=first_schedule(program, group.schedule, row),
    )
    nought = jax.tree.map(lambda leaf: set_row(leaf, row, jnp.zeros_like(leaf[0])), stats)
    return group, host, nought


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for: one ranks the pages."""
    return 1


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do."""
    return True


def end_chunk(
    program: GroupProgram,
    group: CodedOffloadedGroup,
    host: CodedHost,
    stats: RerankStats,
    chunk: Chunk,
) -> tuple[CodedOffloadedGroup, CodedHost, RerankStats]:
    """Codes pages that filled up, for their slots and the host, then reranks: see `offloaded`."""
    words, block, in_tail = coded_pages(group.k, group.v, chunk, _codec(program))
    host = offload_words(host, words, block)
    slots = _with_pages(group.slots, group.slot_page, words, chunk.filled_page)
    summaries = program.score.update(
        group.summaries,
        group.score_state,
        FilledPages(group.k, in_tail, chunk.filled_page, chunk.filled_block),
        implementation=program.implementation,
    )
    plan, schedule = next_plan(program, group, host, stats, chunk, summaries)
    group = dataclasses.replace(
        group,
        slots=promote_words(slots, host, plan.load),
        slot_page=plan.slot_page,
        summaries=summaries,
        schedule=schedule,
    )
    return group, host, plan.stats


def _codec(program: GroupProgram) -> Codec:
    assert program.group.codec is not None
    return program.group.codec


def _with_pages(
    slots: jax.Array, slot_page: jax.Array, words: jax.Array, page: jax.Array
) -> jax.Array:
    """slots [B, K, S, words] with the words [E, B, K, words] of pages int32[B, E], -1 for none."""
    slot = find_slots(slot_page, page)  # [B, K, E]
    row, head, _ = jnp.indices(slot.shape, sparse=True)
    slot = jnp.where(slot < 0, slots.shape[2], slot)  # out of bounds: dropped
    return slots.at[row, head, slot].set(words.transpose(1, 2, 0, 3), mode="drop")
