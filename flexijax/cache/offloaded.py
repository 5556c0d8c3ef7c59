"""Offloaded head groups: chosen pages in slots on the device, every page in host memory.

Decode is dense attention over the slots. At a rerank the pages that filled up go to the host, and
of the newly chosen ones those that are not resident come into freed slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache import coded_host
from flexijax.cache.arrays import Chunk, Prompt, Step, set_row, zeros
from flexijax.cache.coded_host import CodedHost, commit_pages
from flexijax.cache.layout import GroupProgram
from flexijax.cache.selected import choose_pages, scatter
from flexijax.cache.tiers import AnyHost, HostPages, offload, offload_pages, promote
from flexijax.pallas_kernels import dispatch_rerank
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.rerank import Plan, Reranked, RerankStats, plan_rerank
from flexijax.pallas_kernels.stores import SlotStore
from flexijax.policies.codec import rotate
from flexijax.policies.page_score import FilledPages, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RerankSchedule:
    """When each head is reranked next, where each has an interval of its own."""

    interval: jax.Array  # int32[B, K], steps from its last rerank to the next
    steps_until_rerank: jax.Array  # int32[B, K]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OffloadedGroup:
    """Keys stand with the channel before the token: scoring them is one plain matrix product."""

    BY_BLOCK: ClassVar[tuple[str, ...]] = ("summaries", "first")
    READ: ClassVar[tuple[str, ...]] = ("slot_page", "first")
    WRITTEN: ClassVar[tuple[str, ...]] = ("k", "v")

    k: jax.Array  # [B, K, H, S, page]
    v: jax.Array  # [B, K, S, page, H]
    slot_page: jax.Array  # int32[B, K, S], logical page in each slot, -1 empty
    summaries: Any  # leaves [blocks, K, ...]
    score_state: Any  # leaves [B, K, ...]
    schedule: RerankSchedule | None  # None: all are reranked after every chunk
    first: jax.Array | None = None  # int32[1, K], where it has places: see `spread.py`


def empty(program: GroupProgram, heads: int) -> tuple[OffloadedGroup, RerankStats]:
    """A group of so many heads that holds nothing, and its statistics; the host tier is apart."""
    sizes, slots, score = program.sizes, program.slots, program.score
    batch, page, width = sizes.batch, sizes.page_size, sizes.shape.head_dim
    group = OffloadedGroup(
        k=zeros((batch, heads, width, slots, page), sizes.dtype),
        v=zeros((batch, heads, slots, page, width), sizes.dtype),
        slot_page=zeros((batch, heads, slots), "int32") - 1,
        summaries=score.empty(sizes.blocks, heads, sizes.page),
        score_state=score.empty_state(batch, heads, sizes.page),
        schedule=empty_schedule(program, heads),
    )
    return group, empty_stats(program, heads)


def empty_schedule(program: GroupProgram, heads: int) -> RerankSchedule | None:
    """Of a group of so many heads; None where all are reranked after every chunk."""
    if program.group.schedule is None:
        return None
    counts = (program.sizes.batch, heads)
    return RerankSchedule(zeros(counts, "int32"), zeros(counts, "int32"))


def empty_stats(program: GroupProgram, heads: int) -> RerankStats:
    """Of a group of so many heads, of which none has been reranked."""
    dtypes = ("int32", "float32", "float32", "int32", "int32", "int32")
    return RerankStats(*(zeros((program.sizes.batch, heads), dtype) for dtype in dtypes))


def store(
    program: GroupProgram, group: OffloadedGroup, heads: tuple[int, ...], q: HeadQueries, step: Step
) -> SlotStore:
    """Where a token's key and value go, and what is attended: whatever the slots hold."""
    return SlotStore(group.k, group.v, group.slot_page, step.held, heads)


def after_step(group: OffloadedGroup, store: SlotStore, step: Step) -> OffloadedGroup:
    """The group with the token in it."""
    return dataclasses.replace(group, k=store.k, v=store.v)


def commit(
    program: GroupProgram,
    group: OffloadedGroup,
    host: AnyHost,
    stats: RerankStats,
    prompt: Prompt,
) -> tuple[OffloadedGroup, AnyHost, RerankStats]:
    """Full pages of a prompt to the host; the chosen ones and the newest straight into slots."""
    sizes, score = program.sizes, program.score
    heads, row = prompt.k.shape[0], prompt.row
    k = prompt.k.reshape(1, heads, -1, sizes.pages, sizes.page_size)
    v = prompt.v.reshape(1, heads, sizes.pages, sizes.page_size, -1)
    page = jnp.arange(sizes.pages, dtype=jnp.int32)
    full = jnp.where(page < prompt.length // sizes.page_size, prompt.blocks, -1)
    new = jnp.where(page * sizes.page_size >= prompt.start, full, -1)
    every = jnp.broadcast_to(page[None, None], (1, heads, sizes.pages))
    k_pages = k[0].transpose(2, 0, 3, 1)  # [P, K, page, H]
    if isinstance(host, CodedHost):
        host, *coded = commit_pages(host, k[0], rotate(v[0]), full)
        k, v = (x[None] for x in coded)
    else:
        host = offload(host, k, v, new[None], every, transfer=program.transfer)
    state = score.fit(k_pages, prompt.length)
    at = jnp.where(new >= 0, new, sizes.blocks)
    summaries = scatter(group.summaries, at, score.summarize(k_pages, state))
    plan = first_plan(program, prompt, summaries, state, full)
    source = jnp.maximum(plan.slot_page, 0)
    slot_k = jnp.take_along_axis(k, source[:, :, None, :, None], axis=3)
    slot_v = jnp.take_along_axis(v, source[:, :, :, None, None], axis=2)
    group = OffloadedGroup(
        k=lax.dynamic_update_slice_in_dim(group.k, slot_k, row, axis=0),
        v=lax.dynamic_update_slice_in_dim(group.v, slot_v, row, axis=0),
        slot_page=lax.dynamic_update_slice_in_dim(group.slot_page, plan.slot_page, row, axis=0),
        summaries=summaries,
        score_state=scatter(group.score_state, row, state),
        schedule=first_schedule(program, group.schedule, row),
    )
    nought = jax.tree.map(lambda leaf: set_row(leaf, row, jnp.zeros_like(leaf[0])), stats)
    return group, host, nought


def read_pages(
    program: GroupProgram,
    group: OffloadedGroup,
    host: HostPages,
    blocks: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The first `count` pages of int32[P] blocks, as a prompt has them: k [K, H, S], v [K, S, H].

    They come from the host; behind them are zeros.
    """
    heads, page, width = host.k.shape[1:]
    pages = len(blocks)
    load = jnp.where(jnp.arange(pages, dtype=jnp.int32) < count, blocks, -1)
    k = jnp.zeros((1, heads, width, pages, page), host.k.dtype)
    v = jnp.zeros((1, heads, pages, page, width), host.v.dtype)
    load = jnp.broadcast_to(load, (1, heads, pages))
    k, v = promote(k, v, host, load, transfer=program.transfer)
    return k.reshape(heads, width, -1), v.reshape(heads, -1, width)


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for: one ranks the pages."""
    return 1


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do."""
    return True


def end_chunk(
    program: GroupProgram,
    group: OffloadedGroup,
    host: AnyHost,
    stats: RerankStats,
    chunk: Chunk,
) -> tuple[OffloadedGroup, AnyHost, RerankStats]:
    """Offloads the pages that filled up, then brings newly chosen ones into the slots.

    Heads that are not due keep what is in their slots; pages that filled up there are offloaded all
    the same, those of requests that ended in this chunk too.
    """
    filled = (group.slot_page, chunk.filled_page, chunk.filled_block)
    slots_k, slots_v = group.k, group.v
    if isinstance(host, CodedHost):
        host, slots_k, slots_v = coded_host.offload_pages(host, slots_k, slots_v, *filled)
    else:
        host = offload_pages(host, slots_k, slots_v, *filled, transfer=program.transfer)
    summaries = program.score.update(
        group.summaries,
        group.score_state,
        FilledPages(slots_k, *filled),
        implementation=program.implementation,
    )
    plan, schedule = next_plan(program, group, host, stats, chunk, summaries)
    slots_k, slots_v = promote(slots_k, slots_v, host, plan.load, transfer=program.transfer)
    group = OffloadedGroup(
        k=slots_k,
        v=slots_v,
        slot_page=plan.slot_page,
        summaries=summaries,
        score_state=group.score_state,
        schedule=schedule,
    )
    return group, host, plan.stats


def first_plan(
    program: GroupProgram, prompt: Prompt, summaries: Any, state: Any, full: jax.Array
) -> Plan:
    """What is to be in the slots of a prompt's row, of none before.

    state: of its score, leaves [K, ...]. full: int32[P], blocks of its full pages, -1 for others.
    """
    sizes, heads, length = program.sizes, prompt.k.shape[0], prompt.length[None]
    # Blocks of the newest page may not be in `full`; it has no summary and stays by rule.
    table = PageTable.of_full_pages(jnp.maximum(full, 0)[None], length, sizes.page_size)
    of_row = jax.tree.map(lambda leaf: leaf[None], state)
    chosen = chosen_pages(program, prompt.queries[-1:], summaries, of_row, table)
    nothing = jnp.full((1, heads, program.slots), -1, jnp.int32)
    since = jnp.zeros((1, heads), jnp.int32)
    return plan_rerank(chosen, nothing, length, since, pages=sizes.pages, page_size=sizes.page_size)


def next_plan(
    program: GroupProgram, group: Any, host: Any, stats: RerankStats, chunk: Chunk, summaries: Any
) -> tuple[Reranked, RerankSchedule | None]:
    """What is to be in the slots after a chunk, and when heads are reranked next.

    host: with the pages that filled up, for which the plan waits.
    """
    page_size = program.sizes.page_size
    assert chunk.queries is not None
    table = PageTable(chunk.block_table, chunk.lengths, chunk.summarized, page_size)
    chosen = chosen_pages(program, chunk.queries[-1], summaries, group.score_state, table)
    due, since = due_heads(program, group.schedule, chunk)
    plan = dispatch_rerank.rerank(
        chosen,
        group.slot_page,
        chunk.lengths,
        since,
        due,
        chunk.block_table,
        chunk.filled_page,
        stats,
        page_size=page_size,
        after=tuple(jax.tree.leaves(host)),
        implementation=program.implementation,
    )
    return plan, next_schedule(program, group.schedule, chunk, due, plan.rco)


def chosen_pages(
    program: GroupProgram, q: jax.Array, summaries: Any, score_state: Any, table: PageTable
) -> jax.Array:
    """int32[B, K, room]: the pages to be resident, for q [B, K, G, H]; -1 where there are fewer."""
    assert program.group.room is not None
    return choose_pages(program, q, summaries, score_state, table, count=program.group.room)


def due_heads(
    program: GroupProgram, schedule: RerankSchedule | None, chunk: Chunk
) -> tuple[jax.Array, jax.Array]:
    """Heads reranked now, int32, positive, and tokens held at their last; [B, K] or [B, 1]."""
    if schedule is None:
        # Where a request has ended its length is 0, and nowhere else.
        return chunk.lengths[:, None], chunk.before[:, None]
    due = chunk.active[:, None] & (schedule.steps_until_rerank <= program.sizes.chunk_steps)
    return due.astype(jnp.int32), chunk.lengths[:, None] - schedule.interval


def first_schedule(
    program: GroupProgram, schedule: RerankSchedule | None, row: jax.Array
) -> RerankSchedule | None:
    """The schedule of a request whose prompt has just ranked its heads."""
    adaptive = program.group.schedule
    if schedule is None or adaptive is None:
        return schedule
    first = adaptive.first
    return RerankSchedule(
        schedule.interval.at[row].set(first), schedule.steps_until_rerank.at[row].set(first)
    )


def next_schedule(
    program: GroupProgram,
    schedule: RerankSchedule | None,
    chunk: Chunk,
    due: jax.Array,
    rco: jax.Array,
) -> RerankSchedule | None:
    """The schedule after a chunk, of which the heads `due`, int32[B, K], were reranked."""
    adaptive = program.group.schedule
    if schedule is None or adaptive is None:
        return schedule
    interval = jnp.where(due > 0, adaptive.following(schedule.interval, rco), schedule.interval)
    gone = jnp.where(chunk.active, program.sizes.chunk_steps, 0)[:, None]
    left = schedule.steps_until_rerank - gone
    return RerankSchedule(interval, jnp.where(due > 0, interval, left))
