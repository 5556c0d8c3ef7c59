"""Selected head groups: all pages in a pool on the device, some of them chosen at every step."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flexijax.cache.arrays import Chunk, Prompt, Step, zeros
from flexijax.cache.layout import GroupProgram
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.stores import PageStore
from flexijax.policies.page_score import FilledPages, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedGroup:
    """Pages lie by block, read through the block table."""

    BY_BLOCK: ClassVar[tuple[str, ...]] = ("k", "v", "summaries", "first")
    READ: ClassVar[tuple[str, ...]] = ("summaries", "score_state", "first")
    WRITTEN: ClassVar[tuple[str, ...]] = ("k", "v")

    k: jax.Array  # [blocks, K, page, H]
    v: jax.Array  # [blocks, K, page, H]
    summaries: Any  # leaves [blocks, K, ...]
    score_state: Any  # leaves [B, K, ...]
    first: jax.Array | None = None  # int32[1, K], where it has places: see `spread.py`


def empty(program: GroupProgram, heads: int) -> tuple[SelectedGroup, None]:
    """A group of so many heads that holds nothing; it has no statistics."""
    sizes, score = program.sizes, program.group.score
    pool = (sizes.blocks, heads, sizes.page_size, sizes.shape.head_dim)
    group = SelectedGroup(
        k=zeros(pool, sizes.dtype),
        v=zeros(pool, sizes.dtype),
        summaries=() if score is None else score.empty(sizes.blocks, heads, sizes.page),
        score_state=() if score is None else score.empty_state(sizes.batch, heads, sizes.page),
    )
    return group, None


def store(
    program: GroupProgram,
    group: SelectedGroup,
    heads: tuple[int, ...],
    q: HeadQueries,
    step: Step,
    pages: jax.Array | None = None,
) -> PageStore:
    """Where a token's key and value go, and what is attended: the best pages for the queries.

    Pages that have filled since the chunk began have no summary yet, and are attended by rule.
    pages: int32[B, K, n], of a group that has them from another layer.
    """
    if pages is None:
        pages = attended_pages(program, group, q, step)
    return PageStore(group.k, group.v, pages, step.block_table, step.held, heads)


def attended_pages(program: GroupProgram, group: Any, q: HeadQueries, step: Step) -> jax.Array:
    """int32[B, K, n]: the pages that a step attends to, of a group with summaries and states."""
    sizes = program.sizes
    assert program.group.attends is not None
    return choose_pages(
        program,
        q,
        group.summaries,
        group.score_state,
        PageTable(step.block_table, step.lengths, step.summarized, sizes.page_size),
        count=program.group.attends,
        newer=-(-sizes.chunk_steps // sizes.page_size),
    )


def after_step(group: SelectedGroup, store: PageStore, step: Step) -> SelectedGroup:
    """The group with the token in it."""
    return dataclasses.replace(group, k=store.k, v=store.v)


def commit(
    program: GroupProgram, group: SelectedGroup, host: None, stats: None, prompt: Prompt
) -> tuple[SelectedGroup, None, None]:
    """A prompt into its blocks of the pool."""
    sizes, heads = program.sizes, prompt.k.shape[0]
    page = jnp.arange(sizes.pages, dtype=jnp.int32)
    new = (page < -(-prompt.length // sizes.page_size)) & (page * sizes.page_size >= prompt.start)
    table = jnp.where(new, prompt.blocks, sizes.blocks)  # others: out of bounds, dropped
    k = prompt.k.reshape(heads, -1, sizes.pages, sizes.page_size)
    k_pages = k.transpose(2, 0, 3, 1)  # [P, K, page, H]
    v_pages = prompt.v.reshape(heads, sizes.pages, sizes.page_size, -1).swapaxes(0, 1)
    group = dataclasses.replace(
        group,
        k=group.k.at[table].set(k_pages, mode="drop"),
        v=group.v.at[table].set(v_pages, mode="drop"),
    )
    return with_summaries(program, group, k_pages, table, prompt), None, None


def with_summaries(
    program: GroupProgram, group: Any, k_pages: jax.Array, table: jax.Array, prompt: Prompt
) -> Any:
    """The group with a prompt's summaries, of keys [P, K, page, H], at blocks int32[P]."""
    score = program.group.score
    if score is None:
        return group
    state = score.fit(k_pages, prompt.length)
    return dataclasses.replace(
        group,
        summaries=scatter(group.summaries, table, score.summarize(k_pages, state)),
        score_state=scatter(group.score_state, prompt.row, state),
    )


def read_pages(
    program: GroupProgram, group: SelectedGroup, host: None, blocks: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The first `count` pages of int32[P] blocks, as a prompt has them: k [K, H, S], v [K, S, H].

    What stands behind them means nothing.
    """
    heads, width = group.k.shape[1], group.k.shape[3]
    k = group.k[blocks].transpose(1, 3, 0, 2).reshape(heads, width, -1)
    return k, group.v[blocks].swapaxes(0, 1).reshape(heads, -1, width)


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for: none, it chooses nothing."""
    return 0


def choose_pages(
    program: GroupProgram,
    q: jax.Array | HeadQueries,
    summaries: Any,
    score_state: Any,
    table: PageTable,
    *,
    count: int,
    newer: int = 0,
) -> jax.Array:
    """int32[B, K, n]: the pages that q [B, K, G, H] ranks highest; see `dispatch.select_pages`."""
    scores = program.score.scores(
        q,
        summaries,
        score_state,
        table,
        scale=program.sizes.shape.scale,
        implementation=program.implementation,
    )
    return dispatch.select_pages(
        scores,
        table.lengths,
        table.summarized,
        count=count,
        newer=newer,
        page_size=table.page_size,
        sinks=program.policy.sink_pages,
        implementation=program.implementation,
    )


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do: pages to summarise."""
    return program.group.score is not None


def end_chunk(
    program: GroupProgram, group: SelectedGroup, host: None, stats: None, chunk: Chunk
) -> tuple[SelectedGroup, None, None]:
    """Summarises the pages that filled up, those of requests that ended in this chunk too."""
    summaries = program.score.update(
        group.summaries,
        group.score_state,
        FilledPages(group.k, None, chunk.filled_page, chunk.filled_block),
        implementation=program.implementation,
    )
    return dataclasses.replace(group, summaries=summaries), None, None


def scatter(pools: Any, at: jax.Array, rows: Any) -> Any:
    """Leaves with new rows at index `at`; those out of bounds are dropped."""
    return jax.tree.map(lambda pool, new: pool.at[at].set(new, mode="drop"), pools, rows)
