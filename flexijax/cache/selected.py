"""Selected head groups: all pages in a pool on the device, some of them chosen at every step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, Prompt, Step, zeros
from flexijax.cache.layout import GroupProgram
from flexijax.pallas_kernels import dispatch
from flexijax.policies.page_score import FilledPages, PageTable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelectedGroup:
    """Pages lie by block, read through the block table."""

    k: jax.Array  # [blocks, K, page, H]
    v: jax.Array  # [blocks, K, page, H]
    summaries: Any  # leaves [blocks, K, ...]
    score_state: Any  # leaves [B, K, ...]


def empty(program: GroupProgram, heads: int) -> tuple[SelectedGroup, None]:
    """A group of so many heads that holds nothing; it has no statistics."""
    sizes = program.sizes
    pool = (sizes.blocks, heads, sizes.page_size, sizes.shape.head_dim)
    score = program.score
    group = SelectedGroup(
        k=zeros(pool, sizes.dtype),
        v=zeros(pool, sizes.dtype),
        summaries=score.empty(sizes.blocks, heads, sizes.page),
        score_state=score.empty_state(sizes.batch, heads, sizes.page),
    )
    return group, None


def attend(
    program: GroupProgram,
    group: SelectedGroup,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    step: Step,
) -> tuple[jax.Array, SelectedGroup]:
    """Writes a token's key and value, attends to the best pages: q, out [B, K, G, H]."""
    sizes, score = program.sizes, program.score
    page_size, blocks = sizes.page_size, sizes.blocks
    # Of whole numbers that are never negative; // and % would be 18 instructions in each layer.
    page, offset = lax.div(step.lengths, page_size), lax.rem(step.lengths, page_size)
    block = jnp.take_along_axis(step.block_table, page[:, None], axis=1, mode="clip")[:, 0]
    written = jnp.where(step.active, block, blocks)  # out of bounds: dropped
    pages_k = group.k.at[written, :, offset].set(k, mode="drop")
    pages_v = group.v.at[written, :, offset].set(v, mode="drop")
    # A page is summarised once, when it is full; until then it is the newest, chosen by rule.
    full = jnp.where(offset == page_size - 1, written, blocks)
    filled = score.summarize(jnp.take(pages_k, block, axis=0, mode="clip"), group.score_state)
    summaries = jax.tree.map(
        lambda pool, rows: pool.at[full].set(rows, mode="drop"), group.summaries, filled
    )
    lengths = jnp.where(step.active, step.lengths + 1, 0)
    scores = score.scores(
        q,
        summaries,
        group.score_state,
        PageTable(step.block_table, lengths, page_size),
        scale=sizes.shape.scale,
        implementation=program.implementation,
    )
    ranks = program.policy.rank_pages(scores, lengths, page_size=page_size)
    assert program.group.attends is not None
    pages = top_pages(ranks, program.group.attends)
    ids = jnp.take_along_axis(step.block_table[:, None], jnp.maximum(pages, 0), axis=2)
    counts = jnp.clip(lengths[:, None, None] - pages * page_size, 0, page_size)
    out, _ = dispatch.paged_decode(
        q,
        pages_k,
        pages_v,
        jnp.where(pages < 0, -1, ids),
        jnp.where(pages < 0, 0, counts),
        scale=sizes.shape.scale,
        implementation=program.implementation,
    )
    return out, SelectedGroup(pages_k, pages_v, summaries, group.score_state)


def commit(
    program: GroupProgram, group: SelectedGroup, host: None, stats: None, prompt: Prompt
) -> tuple[SelectedGroup, None, None]:
    """A prompt into its blocks of the pool."""
    sizes, score = program.sizes, program.score
    heads = prompt.k.shape[0]
    page = jnp.arange(sizes.pages, dtype=jnp.int32)
    used = page < -(-prompt.length // sizes.page_size)
    table = jnp.where(used, prompt.blocks, sizes.blocks)  # beyond: out of bounds, dropped
    k = prompt.k.reshape(heads, -1, sizes.pages, sizes.page_size)
    k_pages = k.transpose(2, 0, 3, 1)  # [P, K, page, H]
    v_pages = prompt.v.reshape(heads, sizes.pages, sizes.page_size, -1).swapaxes(0, 1)
    state = score.fit(k_pages, prompt.length)
    group = SelectedGroup(
        k=group.k.at[table].set(k_pages, mode="drop"),
        v=group.v.at[table].set(v_pages, mode="drop"),
        summaries=scatter(group.summaries, table, score.summarize(k_pages, state)),
        score_state=scatter(group.score_state, prompt.row, state),
    )
    return group, None, None


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for: none, it chooses nothing."""
    return 0


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do."""
    return True


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


def top_pages(ranks: jax.Array, count: int) -> jax.Array:
    """int32[B, K, n]: the pages of the n = min(count, P) greatest ranks, -1 where none is left."""
    best, page = lax.top_k(ranks, min(count, ranks.shape[-1]))
    return jnp.where(best > -jnp.inf, page, -1).astype(jnp.int32)


def scatter(pools: Any, at: jax.Array, rows: Any) -> Any:
    """Leaves with new rows at index `at`; those out of bounds are dropped."""
    return jax.tree.map(lambda pool, new: pool.at[at].set(new, mode="drop"), pools, rows)
