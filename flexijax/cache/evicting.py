"""Evicting head groups: tokens with limited room on the device, the lowest ranked overwritten.

A head's tokens stand in its buffer without gaps, in any order: the first `count` places are taken.
Decode writes behind them; at the end of a chunk what ranks too low is overwritten by what ranks
high among the last, so that at most R tokens of a head move.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, Prompt, Step, empty_state, set_row, zeros
from flexijax.cache.layout import GroupProgram
from flexijax.cache.observe import observe_chunk, prompt_positions, prompt_state
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.stores import SlotStore
from flexijax.policies.base import PolicyState, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvictingGroup:
    """T = S * page places a head; what stands at and beyond `count` is not read."""

    BY_BLOCK: ClassVar[tuple[str, ...]] = ("first",)
    READ: ClassVar[tuple[str, ...]] = ("first",)
    WRITTEN: ClassVar[tuple[str, ...]] = ("k", "v", "position", "count")

    k: jax.Array  # [B, K, H, S, page]
    v: jax.Array  # [B, K, S, page, H]
    position: jax.Array  # int32[B, K, T], of each token in the text
    count: jax.Array  # int32[B, K]
    state: PolicyState  # leaves [B, K, T, ...] of tokens, [B, K, ...] of heads
    first: jax.Array | None = None  # int32[1, K], where it has places: see `spread.py`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvictionStats:
    """Since a request was admitted."""

    evicted: jax.Array  # int32[B, K], tokens dropped, those of the prompt among them


def empty(program: GroupProgram, heads: int) -> tuple[EvictingGroup, EvictionStats]:
    """A group of so many heads that holds nothing, and its statistics."""
    sizes, slots = program.sizes, program.slots
    batch, page, width = sizes.batch, sizes.page_size, sizes.shape.head_dim
    group = EvictingGroup(
        k=zeros((batch, heads, width, slots, page), sizes.dtype),
        v=zeros((batch, heads, slots, page, width), sizes.dtype),
        position=zeros((batch, heads, slots * page), "int32") - 1,
        count=zeros((batch, heads), "int32"),
        state=empty_state(program, heads, slots * page),
    )
    return group, EvictionStats(zeros((batch, heads), "int32"))


def store(
    program: GroupProgram, group: EvictingGroup, heads: tuple[int, ...], q: HeadQueries, step: Step
) -> SlotStore:
    """Where a token's key and value go, and what is attended: all that is held."""
    held = jnp.where(step.active[:, None], group.count, -1)
    return SlotStore(group.k, group.v, None, held, heads)


def after_step(group: EvictingGroup, store: SlotStore, step: Step) -> EvictingGroup:
    """The group with the token in it."""
    row, head = _rows_and_heads(group.count)
    place = jnp.where(step.active[:, None], group.count, group.position.shape[2])  # dropped
    return dataclasses.replace(
        group,
        k=store.k,
        v=store.v,
        position=group.position.at[row, head, place].set(step.held[:, None], mode="drop"),
        count=group.count + step.active[:, None].astype(jnp.int32),
    )


def commit(
    program: GroupProgram, group: EvictingGroup, host: None, stats: EvictionStats, prompt: Prompt
) -> tuple[EvictingGroup, None, EvictionStats]:
    """The prompt's highest ranked tokens into row `prompt.row`, in the order of the text."""
    sizes, policy = program.sizes, program.policy
    heads, _, length = prompt.k.shape
    state = policy.across_heads(prompt_state(program, prompt), prompt.layer)
    position = prompt_positions(length, prompt.length)

    def rank(state: PolicyState, k: jax.Array, v: jax.Array) -> jax.Array:
        tokens = Tokens(k.T, v, position, prompt.length, prompt.layer)
        return policy.rank_tokens(program.group, state, tokens)

    ranks = jnp.where(position >= 0, jax.vmap(rank)(state, prompt.k, prompt.v), -jnp.inf)
    room = program.group.prompt_room or program.group.room
    assert room is not None
    best, kept = lax.top_k(ranks, min(room, length))
    count = (best > -jnp.inf).sum(-1, dtype=jnp.int32)  # [K]
    kept = jnp.sort(jnp.where(best > -jnp.inf, kept, length), axis=-1)
    kept = jnp.pad(kept, ((0, 0), (0, program.slots * sizes.page_size - kept.shape[1])))
    kept = jnp.minimum(kept, length - 1)  # beyond the count: not read
    slots = (program.slots, sizes.page_size)
    k = jnp.take_along_axis(prompt.k, kept[:, None], axis=2).reshape(heads, -1, *slots)
    v = jnp.take_along_axis(prompt.v, kept[:, :, None], axis=1).reshape(heads, *slots, -1)
    state = PolicyState(jax.tree.map(lambda leaf: _take(leaf, kept), state.tokens), state.head)
    row = prompt.row
    group = EvictingGroup(
        k=set_row(group.k, row, k),
        v=set_row(group.v, row, v),
        position=set_row(group.position, row, position[kept]),
        count=set_row(group.count, row, count),
        state=jax.tree.map(lambda all, new: set_row(all, row, new), group.state, state),
    )
    return group, None, EvictionStats(set_row(stats.evicted, row, prompt.length - count))


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for."""
    return program.sizes.chunk_steps if program.policy.observes_decode else 1


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do."""
    return True


def end_chunk(
    program: GroupProgram, group: EvictingGroup, host: None, stats: EvictionStats, chunk: Chunk
) -> tuple[EvictingGroup, None, EvictionStats]:
    """Shows the policy the chunk's queries, then drops what its room does not hold."""
    policy, room = program.policy, program.group.room
    assert room is not None
    batch, heads, width = group.k.shape[:3]
    places = group.position.shape[2]
    place = jnp.arange(places, dtype=jnp.int32)
    taken = place < group.count[..., None]
    position = jnp.where(taken, group.position, -1)
    k = group.k.reshape(batch, heads, width, places)
    v = group.v.reshape(batch, heads, places, width)
    came = taken & (position >= chunk.before[:, None, None])
    state = _forgotten(program, group.state, came)
    if policy.observes_decode:
        state = observe_chunk(program, state, k, v, position, chunk)

    def rank(state, k, v, position, length):
        tokens = Tokens(k.T, v, position, length, chunk.layer)
        return policy.rank_tokens(program.group, state, tokens)

    of_heads = jax.vmap(rank, in_axes=(0, 0, 0, 0, None))
    ranks = jax.vmap(of_heads)(state, k, v, position, chunk.lengths)
    # Of the lowest ranked at most R must go, since no more have come. A token of rank +inf still
    # goes before a place that has none.
    moves = min(program.sizes.chunk_steps, places)
    lowness = jnp.maximum(-ranks, jnp.finfo(ranks.dtype).min)
    _, lowest = lax.top_k(jnp.where(taken, lowness, -jnp.inf), moves)
    # Where a chunk goes on there is room for its rest.
    ends = (chunk.held > chunk.before)[:, None]
    evicted = jnp.where(ends, jnp.maximum(group.count - room, 0), 0)  # [B, K]
    goes = jnp.arange(moves, dtype=jnp.int32) < evicted[..., None]
    count = group.count - evicted
    # Places below the new count that lose their token take those above it that keep theirs.
    row, head = _rows_and_heads(lowest)
    leaves = jnp.zeros((batch, heads, places), bool)
    leaves = leaves.at[row, head, jnp.where(goes, lowest, places)].set(True, mode="drop")
    gap = jnp.sort(jnp.where(goes & (lowest < count[..., None]), lowest, places), axis=-1)
    behind = count[..., None] + jnp.arange(moves, dtype=jnp.int32)
    stays = (behind < group.count[..., None]) & ~_take(leaves, jnp.minimum(behind, places - 1))
    source = jnp.sort(jnp.where(stays, behind, places), axis=-1)
    group = _moved(program, dataclasses.replace(group, count=count, state=state), source, gap)
    return group, None, EvictionStats(stats.evicted + evicted)


def _forgotten(program: GroupProgram, state: PolicyState, fresh: jax.Array) -> PolicyState:
    """As before anything was observed at the places bool[B, K, T], where others stood before."""
    empty = program.policy.init_state(fresh.shape[-1])

    def leaf(kept: jax.Array, initial: jax.Array) -> jax.Array:
        return jnp.where(fresh.reshape(*fresh.shape, *(1,) * (initial.ndim - 1)), initial, kept)

    return PolicyState(jax.tree.map(leaf, state.tokens, empty.tokens), state.head)


def _moved(
    program: GroupProgram, group: EvictingGroup, source: jax.Array, target: jax.Array
) -> EvictingGroup:
    """Tokens at places int32[B, K, n] to others; places out of bounds: nothing moves."""
    page = program.sizes.page_size
    row, head = _rows_and_heads(source)
    read = jnp.minimum(source, group.position.shape[2] - 1)
    at = (row, head, lax.div(read, page), lax.rem(read, page))
    to = (row, head, lax.div(target, page), lax.rem(target, page))
    k = group.k[at[0], at[1], :, at[2], at[3]]  # [B, K, n, H]

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf.at[row, head, target].set(leaf[row, head, read], mode="drop")

    return dataclasses.replace(
        group,
        k=group.k.at[to[0], to[1], :, to[2], to[3]].set(k, mode="drop"),
        v=group.v.at[to].set(group.v[at], mode="drop"),
        position=flat(group.position),
        state=PolicyState(jax.tree.map(flat, group.state.tokens), group.state.head),
    )


def _rows_and_heads(like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of the first two axes of an array [B, K, ...], to index with it."""
    rest = (1,) * (like.ndim - 2)
    row = jnp.arange(like.shape[0]).reshape(-1, 1, *rest)
    return row, jnp.arange(like.shape[1]).reshape(1, -1, *rest)


def _take(leaf: jax.Array, place: jax.Array) -> Any:
    """leaf [..., T, ...] at int32[..., n] along the axis after the leading ones."""
    axis = place.ndim - 1
    place = place.reshape(*place.shape, *(1,) * (leaf.ndim - place.ndim))
    return jnp.take_along_axis(leaf, place, axis=axis)
