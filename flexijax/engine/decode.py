"""Decode steps of a whole batch, sampled or teacher-forced, and what follows a chunk of them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, ChunkEnd, Step, chunk_end
from flexijax.cache.cache import LayerCache, kind
from flexijax.cache.decode_attention import DecodeAttention, DecodeState
from flexijax.cache.layout import GroupProgram
from flexijax.engine.batch import BatchState, SampledTokens
from flexijax.engine.program import Program
from flexijax.engine.sampling import sample, step_keys
from flexijax.models.decoder import Params

# Of each layer and head group: [W, B, K, G, H], or None for groups that want none.
Queries: TypeAlias = tuple[tuple[jax.Array | None, ...], ...]


# Of each layer, its head groups: the arrays that a step reads and writes.
Groups: TypeAlias = tuple[tuple[Any, ...], ...]


def decode_steps(
    program: Program,
    params: Params,
    groups: Groups,
    block_table: jax.Array,
    lengths: jax.Array,
    batch: BatchState,
) -> tuple[Groups, ChunkEnd, BatchState, SampledTokens, Queries]:
    """R = `program.chunk_steps` decode steps of all requests; groups are donated.

    block_table: int32[B, P]; lengths: int32[B], tokens held. Nothing goes to Python or to the host
    in between. Returns groups and batch after the steps, what was sampled, and what
    `end_chunk_layer` asks for.
    """

    def step(carry, _):
        groups, lengths, batch, _ = carry
        at = Step(block_table, lengths, batch.active)
        groups, logits, (last, every) = _step(program, params, groups, at, batch.tokens)
        if program.suppress_ids:
            logits = logits.at[:, jnp.array(program.suppress_ids)].set(-jnp.inf)
        keys = step_keys(batch.seeds, batch.generated)
        token, logprob = sample(logits, batch.sampling, keys, method=program.sampling)
        active = batch.active
        stopped = (token[:, None] == batch.stop_ids).any(-1) | (batch.remaining <= 1)
        count = active.astype(jnp.int32)
        batch = dataclasses.replace(
            batch,
            tokens=jnp.where(active, token, batch.tokens),
            active=active & ~stopped,
            remaining=batch.remaining - count,
            generated=batch.generated + count,
        )
        sampled = SampledTokens(token, logprob, active)
        return (groups, lengths + count, batch, last), (sampled, every)

    carry = (groups, lengths, batch, _no_queries(program))
    (groups, held, batch, last), (sampled, every) = lax.scan(
        step, carry, None, length=program.chunk_steps
    )
    end = chunk_end(program.layout.sizes, block_table, lengths, held, batch.active)
    return groups, end, batch, sampled, _joined(last, every)


def teacher_forced_steps(
    program: Program,
    params: Params,
    groups: Groups,
    block_table: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[Groups, ChunkEnd, jax.Array, Queries]:
    """As `decode_steps` on given tokens, for comparing policies on one and the same text.

    tokens: int32[R, B], fed in order; active: bool[B]; groups: donated. Returns groups, where the
    batch stands, the logits float32[R, B, V] of what would come after each token, and queries.
    """

    def step(carry, token):
        groups, lengths, _ = carry
        at = Step(block_table, lengths, active)
        groups, logits, (last, every) = _step(program, params, groups, at, token)
        return (groups, lengths + active.astype(jnp.int32), last), (logits, every)

    carry = (groups, lengths, _no_queries(program))
    (groups, held, last), (logits, every) = lax.scan(step, carry, tokens)
    end = chunk_end(program.layout.sizes, block_table, lengths, held, active)
    return groups, end, logits, _joined(last, every)


def end_chunk_layer(
    programs: tuple[GroupProgram, ...],
    layer_cache: LayerCache,
    end: ChunkEnd,
    queries: tuple[jax.Array | None, ...],
    layer: jax.Array,
) -> LayerCache:
    """What each head group of a layer does after R steps: offload, rerank, observe, evict.

    layer_cache: donated. queries: of `decode_steps`. layer: int32[].
    """
    groups, hosts, counts = [], [], []
    for program, group, host, stats, mine in zip(
        programs, layer_cache.groups, layer_cache.host, layer_cache.stats, queries, strict=True
    ):
        made = (group, host, stats)
        if kind(program.group).has_chunk_end(program):
            chunk = Chunk(**vars(end), layer=layer, queries=mine)
            made = kind(program.group).end_chunk(program, group, host, stats, chunk)
        for parts, part in zip((groups, hosts, counts), made, strict=True):
            parts.append(part)
    return LayerCache(tuple(groups), tuple(hosts), tuple(counts))


def _step(
    program: Program, params: Params, groups: Groups, step: Step, tokens: jax.Array
) -> tuple[Groups, jax.Array, tuple[Queries, Queries]]:
    """One token a request: (groups, logits float32[B, V], queries kept of the last, of every)."""
    attention_fn = DecodeAttention(program.layout, program.policy, program.implementation)
    x, state = program.decoder.hidden(
        params, tokens[:, None], step.lengths[:, None], attention_fn, DecodeState(groups, step, ())
    )
    last = _where(program, state.queries, lambda wanted: wanted == 1)
    every = _where(program, state.queries, lambda wanted: wanted > 1)
    return state.layers, program.decoder.logits(params, x[:, 0]), (last, every)


def _where(program: Program, queries: Any, wanted: Any) -> Queries:
    """The queries of groups whose number of them is wanted, None for the others."""
    return tuple(
        tuple(
            q if wanted(kind(of.group).num_queries(of)) else None
            for of, q in zip(program.groups[layer], of_layer, strict=True)
        )
        for layer, of_layer in enumerate(queries)
    )


def _no_queries(program: Program) -> Queries:
    sizes = program.layout.sizes
    shape = sizes.shape
    queries = tuple(
        tuple(
            jnp.zeros(
                (sizes.batch, len(group.heads), shape.group_size, shape.head_dim), sizes.dtype
            )
            for group in groups
        )
        for groups in program.layout.groups
    )
    return _where(program, queries, lambda wanted: wanted == 1)


def _joined(last: Queries, every: Queries) -> Queries:
    """One tree of both: the last query as a window of one, of groups that want no more."""
    return tuple(
        tuple(many if one is None else one[None] for one, many in zip(ones, manies, strict=True))
        for ones, manies in zip(last, every, strict=True)
    )
