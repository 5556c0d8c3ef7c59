"""Dense head groups: every page of a request in the head's own buffer, everything attended."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from flexijax.cache.arrays import Chunk, Prompt, Step, empty_state, set_row, zeros
from flexijax.cache.layout import GroupProgram
from flexijax.cache.observe import observe_chunk, prompt_state
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.stores import SlotStore
from flexijax.policies.base import PolicyState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseGroup:
    """Keys stand with the channel before the token: scoring them is one plain matrix product."""

    BY_BLOCK: ClassVar[tuple[str, ...]] = ("first",)
    READ: ClassVar[tuple[str, ...]] = ("first",)
    WRITTEN: ClassVar[tuple[str, ...]] = ("k", "v")

    k: jax.Array  # [B, K, H, P, page]
    v: jax.Array  # [B, K, P, page, H]
    state: PolicyState  # leaves [B, K, ...]
    first: jax.Array | None = None  # int32[1, K], where it has places: see `spread.py`


def empty(program: GroupProgram, heads: int) -> tuple[DenseGroup, None]:
    """A group of so many heads that holds nothing; it has no statistics."""
    sizes = program.sizes
    batch, pages, page, width = sizes.batch, sizes.pages, sizes.page_size, sizes.shape.head_dim
    group = DenseGroup(
        k=zeros((batch, heads, width, pages, page), sizes.dtype),
        v=zeros((batch, heads, pages, page, width), sizes.dtype),
        state=empty_state(program, heads, sizes.max_tokens),
    )
    return group, None


def store(
    program: GroupProgram, group: DenseGroup, heads: tuple[int, ...], q: HeadQueries, step: Step
) -> SlotStore:
    """Where a token's key and value go, and what is attended: all."""
    return SlotStore(group.k, group.v, None, step.held, heads)


def after_step(group: DenseGroup, store: SlotStore, step: Step) -> DenseGroup:
    """The group with the token in it."""
    return dataclasses.replace(group, k=store.k, v=store.v)


def commit(
    program: GroupProgram, group: DenseGroup, host: None, stats: None, prompt: Prompt
) -> tuple[DenseGroup, None, None]:
    """A prompt into row `prompt.row`."""
    sizes = program.sizes
    heads = prompt.k.shape[0]
    k = prompt.k.reshape(heads, -1, sizes.pages, sizes.page_size)
    v = prompt.v.reshape(heads, sizes.pages, sizes.page_size, -1)
    state = prompt_state(program, prompt)
    group = DenseGroup(
        k=set_row(group.k, prompt.row, k),
        v=set_row(group.v, prompt.row, v),
        state=jax.tree.map(lambda all, new: set_row(all, prompt.row, new), group.state, state),
    )
    return group, None, None


def num_queries(program: GroupProgram) -> int:
    """How many of a chunk's last queries `end_chunk` asks for."""
    return program.sizes.chunk_steps if program.policy.observes_decode else 0


def has_chunk_end(program: GroupProgram) -> bool:
    """Whether `end_chunk` has anything to do."""
    return program.policy.observes_decode


def end_chunk(
    program: GroupProgram, group: DenseGroup, host: None, stats: None, chunk: Chunk
) -> tuple[DenseGroup, None, None]:
    """Shows the policy the chunk's queries over everything that is held."""
    tokens = program.sizes.max_tokens
    batch, heads, width = group.k.shape[:3]
    position = jnp.arange(tokens, dtype=jnp.int32)
    position = jnp.where(position < chunk.lengths[:, None], position, -1)
    state = observe_chunk(
        program,
        group.state,
        group.k.reshape(batch, heads, width, tokens),
        group.v.reshape(batch, heads, tokens, width),
        jnp.broadcast_to(position[:, None], (batch, heads, tokens)),
        chunk,
    )
    return dataclasses.replace(group, state=state), None, None
