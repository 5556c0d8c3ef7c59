"""Head groups of which the shards of a mesh hold different numbers in a layer.

A program is the same on every shard, so a group has as many places in a layer as the shard with
the most heads of it has heads there; on others a place stays empty. Each place is a row of its own:
of B rows and n places there are B * n rows of one KV head. What such a group keeps by block lies in
one pool for all layers, so that it takes what the shard's heads take, and no more: a head of the
shard has the blocks from its `first` on, and an empty place none. Its rows take no part in
anything.

What is kept by row (a buffer of a few pages) has room in every place, empty or not.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.arrays import Chunk, Prompt, Step
from flexijax.cache.kinds import KINDS
from flexijax.cache.layout import CacheLayout, GroupProgram


def row_program(program: GroupProgram, places: int) -> GroupProgram:
    """What a group of so many places in its layer is compiled for: rows of one KV head."""
    sizes, group = program.sizes, program.group
    rows = dataclasses.replace(
        sizes, batch=sizes.batch * places, blocks=sizes.blocks * group.places
    )
    return dataclasses.replace(program, sizes=rows, group=dataclasses.replace(group, places=0))


def empty(program: GroupProgram, heads: int) -> tuple[Any, Any]:
    """A group of so many places that holds nothing, all of them empty, and its statistics."""
    group, stats = _kind(program).empty(row_program(program, heads), 1)
    return dataclasses.replace(group, first=jnp.full((1, heads), -1, jnp.int32)), stats


def step_of(first: jax.Array, step: Step) -> Step:
    """A decode step of the rows of a group's places; first: int32[1, n]."""
    return Step(
        block_table=_blocks(first, step.block_table),
        held=_of_heads(first, step.held, -1),
        summarized=_of_heads(first, step.summarized, 0),
    )


def commit(
    program: GroupProgram, group: Any, host: Any, stats: Any, prompt: Prompt
) -> tuple[Any, Any, Any]:
    """A prompt into the rows of every place."""
    first, of_kind = group.first, _kind(program)
    made = (dataclasses.replace(group, first=None), host, stats)
    places = first.shape[1]
    rows = row_program(program, places)
    for place in range(places):
        begins, of = first[0, place], slice(place, place + 1)
        mine = dataclasses.replace(
            prompt,
            k=prompt.k[of],
            v=prompt.v[of],
            queries=prompt.queries[:, of],
            observed=jax.tree.map(lambda leaf, of=of: leaf[of], prompt.observed),
            row=prompt.row * places + place,
            blocks=prompt.blocks + jnp.maximum(begins, 0),
            length=jnp.where(begins < 0, 0, prompt.length),  # of an empty place nothing counts
        )
        made = of_kind.commit(rows, *made, mine)
    group, host, stats = made
    return dataclasses.replace(group, first=first), host, stats


def read_pages(
    program: GroupProgram, group: Any, host: Any, blocks: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As of the group's kind, of every place; of an empty one they mean nothing."""
    rows, found = row_program(program, group.first.shape[1]), []
    for place in range(group.first.shape[1]):
        begins = jnp.maximum(group.first[0, place], 0)
        found.append(_kind(program).read_pages(rows, group, host, blocks + begins, count))
    k, v = zip(*found, strict=True)
    return jnp.concatenate(k), jnp.concatenate(v)


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for."""
    return _kind(program).num_queries(row_program(program, 1))


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do."""
    return _kind(program).has_chunk_end(row_program(program, 1))


def end_chunk(
    program: GroupProgram, group: Any, host: Any, stats: Any, chunk: Chunk
) -> tuple[Any, Any, Any]:
    """As of the group's kind, over the rows of all places."""
    first, queries = group.first, chunk.queries
    if queries is not None:  # [W, B, n, G, H]
        queries = queries.reshape(len(queries), -1, 1, *queries.shape[3:])
    block = _of_heads(first, chunk.filled_block, -1)
    begins = _rows(first, len(chunk.held))[:, None]
    mine = Chunk(
        block_table=_blocks(first, chunk.block_table),
        before=_of_heads(first, chunk.before, 0),
        held=_of_heads(first, chunk.held, 0),
        lengths=_of_heads(first, chunk.lengths, 0),
        active=_of_heads(first, chunk.active, False),
        summarized=_of_heads(first, chunk.summarized, 0),
        filled_page=_of_heads(first, chunk.filled_page, -1),
        filled_block=jnp.where(block < 0, -1, block + begins),
        layer=chunk.layer,
        queries=queries,
    )
    rows = row_program(program, first.shape[1])
    group, host, stats = _kind(program).end_chunk(
        rows, dataclasses.replace(group, first=None), host, stats, mine
    )
    return dataclasses.replace(group, first=first), host, stats


def firsts(layout: CacheLayout) -> list[tuple[np.ndarray | None, ...]]:
    """Of each layer and group, `first` of all shards: int32[1, S * n], None without places.

    The block from which on a place has its own, -1 for an empty place.
    """
    assert layout.splits is not None
    used: dict[tuple[int, int], int] = {}  # by shard and place of the group in its layer
    found = []
    for groups, split in zip(layout.groups, layout.splits, strict=True):
        of_layer: list[np.ndarray | None] = []
        for at, group in enumerate(groups):
            if not group.places:
                of_layer.append(None)
                continue
            begins = []
            for shard, counts in enumerate(split.counts):
                here = sum(counts[:at])
                for head in group.heads:
                    mine = here <= head < here + counts[at]
                    number = used.setdefault((shard, at), 0)
                    begins.append(number * layout.sizes.blocks if mine else -1)
                    used[shard, at] += mine
            of_layer.append(np.array([begins], np.int32))
        found.append(tuple(of_layer))
    return found


def _kind(program: GroupProgram) -> ModuleType:
    return KINDS[program.group.kind]


def _rows(first: jax.Array, batch: int) -> jax.Array:
    """int32[B * n]: of each row its place's `first`."""
    return jnp.tile(first[0], batch)


def _of_heads(first: jax.Array, x: jax.Array, nothing: Any) -> jax.Array:
    """x [B, ...] as [B * n, ...]: of each row its request's, and `nothing` in empty places."""
    begins = _rows(first, len(x)).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(begins < 0, jnp.asarray(nothing, x.dtype), jnp.repeat(x, first.shape[1], 0))


def _blocks(first: jax.Array, table: jax.Array) -> jax.Array:
    """int32[B, P] as int32[B * n, P]: the blocks in the pool of all layers."""
    begins = jnp.maximum(_rows(first, len(table)), 0)
    return jnp.repeat(table, first.shape[1], 0) + begins[:, None]
