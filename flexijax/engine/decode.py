"""Decode steps of a whole batch, sampled or teacher-forced, and what follows a chunk of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, ChunkEnd, Step, chunk_end
from flexijax.cache.banks import apart, by_block, by_row, only, side_by_side, together
from flexijax.cache.cache import LayerCache, Standing, kind
from flexijax.cache.decode_attention import DecodeAttention, DecodeState
from flexijax.cache.layout import GroupProgram
from flexijax.cache.over_mesh import heads_in
from flexijax.engine.batch import BatchState, SampledTokens, nothing_sampled
from flexijax.engine.program import Program
from flexijax.engine.sampling import most_likely, sample, step_keys
from flexijax.models.decoder import Params
from flexijax.pallas_kernels.filled import in_full_pages

# Of each layer and head group: [W, B, K, G, H], or None for groups that want none.
Queries: TypeAlias = tuple[tuple[jax.Array | None, ...], ...]


@heads_in(queries=2)
class BankEnd(NamedTuple):
    """What follows on some steps of a bank, where a chunk of its rows ends with them."""

    end: ChunkEnd
    queries: Any  # Queries, or those of one layer


# Of each layer [..., B, M, H], see `DecodeAttention`; None where no group asks for queries.
_Kept: TypeAlias = tuple[jax.Array | None, ...]

# Of each layer, its head groups: the arrays that a step reads and writes.
Groups: TypeAlias = tuple[tuple[Any, ...], ...]


@heads_in(pools=1, banks=1, shared=1)
class Held(NamedTuple):
    """Head groups of a cache: what lies by block, and what lies by row of some of its banks.

    shared: what lies by block of all layers whose groups have places, see `cache.spread`.
    """

    pools: Groups
    banks: tuple[Groups, ...]
    shared: tuple[Any, ...] = ()


def decode_steps(
    program: Program,
    params: Params,
    seen: Held,
    held: Held,
    standing: tuple[Standing, ...],
    due: jax.Array,
    batch: BatchState,
) -> tuple[Held, tuple[Standing, ...], BatchState, SampledTokens, tuple[BankEnd, ...]]:
    """T = `program.steps` decode steps of all requests of some banks.

    program: of as many rows. seen, held: arrays that steps only read, and those that they write,
    which are donated. standing: of each bank. due: bool[B], rows whose chunk ends with these steps.
    Nothing goes to Python or to the host in between. Returns what was written, where each bank and
    the batch stand after the steps, what was sampled, and what `end_chunk_layer` asks for.
    """
    rows = side_by_side(standing)
    steps, lengths = program.steps, rows.lengths
    summarized = _whole_pages(program, rows.settled, batch.active)

    def step(carry, _):
        held, lengths, batch, _, index, sampled = carry
        at = Step(rows.block_table, jnp.where(batch.active, lengths, -1), summarized)
        held, logits, (last, every) = _step(program, params, seen, held, lengths, at, batch.tokens)
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
        # Not collected by the scan: on a GPU that is a copy for each, outside of any graph.
        now = (jnp.arange(steps) == index)[:, None]
        best = most_likely(logits, program.alternatives) if program.alternatives else None
        made = SampledTokens(token, logprob, active, best)
        sampled = jax.tree.map(
            lambda leaf, kept: jnp.where(now if leaf.ndim == 1 else now[..., None], leaf, kept),
            made,
            sampled,
        )
        return (held, lengths + count, batch, last, index + 1, sampled), every

    shape = (steps, *lengths.shape)
    sampled = nothing_sampled(shape, program.alternatives)
    carry = (held, lengths, batch, _no_queries(program), jnp.int32(0), sampled)
    (held, lengths, batch, last, _, sampled), every = lax.scan(step, carry, None, length=steps)
    after = rows._replace(lengths=lengths)
    standing, ends = _bank_ends(program, after, due, batch.active, _queries(program, last, every))
    return held, standing, batch, sampled, ends


def teacher_forced_steps(
    program: Program,
    params: Params,
    seen: Held,
    held: Held,
    standing: tuple[Standing, ...],
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[Held, tuple[Standing, ...], jax.Array, tuple[BankEnd, ...]]:
    """As `decode_steps` on given tokens, for comparing policies on one and the same text.

    tokens: int32[R, B], a whole chunk fed in order; active: bool[B]. Returns what was written,
    where the banks stand, the logits float32[R, B, V] of what would come after each token,
    and what `end_chunk_layer` asks for.
    """
    rows = side_by_side(standing)
    summarized = _whole_pages(program, rows.settled, active)

    def step(carry, token):
        held, lengths, _ = carry
        at = Step(rows.block_table, jnp.where(active, lengths, -1), summarized)
        held, logits, (last, every) = _step(program, params, seen, held, lengths, at, token)
        return (held, lengths + active.astype(jnp.int32), last), (logits, every)

    carry = (held, rows.lengths, _no_queries(program))
    (held, lengths, last), (logits, every) = lax.scan(step, carry, tokens)
    after = rows._replace(lengths=lengths)
    standing, ends = _bank_ends(program, after, active, active, _queries(program, last, every))
    return held, standing, logits, ends


def _bank_ends(
    program: Program, rows: Standing, due: jax.Array, active: jax.Array, queries: Queries
) -> tuple[tuple[Standing, ...], tuple[BankEnd, ...]]:
    """Where each bank stands after some steps, and what the ends of its chunks ask for."""
    sizes = program.layout.sizes
    end = chunk_end(sizes, rows.block_table, rows.settled, rows.lengths, due, active)
    rows = rows._replace(
        settled=jnp.where(due, rows.lengths, rows.settled),
        chunks=rows.chunks + end.active.astype(jnp.int32),
    )
    ends = zip(apart(end, sizes.banks), apart(queries, sizes.banks, axis=1), strict=True)
    return tuple(apart(rows, sizes.banks)), tuple(BankEnd(*of) for of in ends)


def end_chunk_layer(
    programs: tuple[GroupProgram, ...],
    layer_cache: LayerCache,
    of: BankEnd,
    layer: jax.Array,
) -> LayerCache:
    """What each head group of a layer does after R steps: offload, rerank, observe, evict.

    layer_cache: donated. of: of `decode_steps`, with the queries of this layer. layer: int32[].
    """
    groups, hosts, counts = [], [], []
    for program, group, host, stats, mine in zip(
        programs, layer_cache.groups, layer_cache.host, layer_cache.stats, of.queries, strict=True
    ):
        made = (group, host, stats)
        if kind(program.group).has_chunk_end(program):
            chunk = Chunk(**vars(of.end), layer=layer, queries=mine)
            made = kind(program.group).end_chunk(program, group, host, stats, chunk)
        for parts, part in zip((groups, hosts, counts), made, strict=True):
            parts.append(part)
    return LayerCache(tuple(groups), tuple(hosts), tuple(counts))


def _whole_pages(program: Program, settled: jax.Array, active: jax.Array) -> jax.Array:
    """int32[B]: tokens that have a summary; what fills up has one when its chunk ends.

    0 of requests that had ended before: what is not to be attended need not be scored.
    """
    return jnp.where(active, in_full_pages(settled, program.layout.sizes.page_size), 0)


def _step(
    program: Program,
    params: Params,
    seen: Held,
    held: Held,
    lengths: jax.Array,
    step: Step,
    tokens: jax.Array,
) -> tuple[Held, jax.Array, tuple[_Kept, _Kept]]:
    """One token a request: (held, logits float32[B, V], what is kept of the last, of every)."""
    attention_fn = DecodeAttention(program.layout, program.policy, program.implementation)
    # One for all layers: each leaves it as it was.
    arrivals = jnp.zeros((len(tokens), program.layout.sizes.shape.num_kv_heads), jnp.int32)
    shared = tuple(map(together, seen.shared, held.shared))
    state = DecodeState(_layers(seen, held), step, (), arrivals, shared=shared)
    x, state = program.decoder.hidden(
        params, tokens[:, None], lengths[:, None], attention_fn, state
    )
    last, every = [], []
    for kept, count in zip(state.queries, _num_queries(program), strict=True):
        last.append(kept if count == 1 else None)
        every.append(kept if count > 1 else None)
    made = _held(state.layers, state.shared)
    return made, program.decoder.logits(params, x[:, 0]), (tuple(last), tuple(every))


def _layers(seen: Held, held: Held) -> tuple[tuple[tuple[Any, ...], ...], ...]:
    """Of each layer its head groups, of each of them its banks."""
    layers = []
    for at, groups in enumerate(held.pools):
        mine = [
            (seen.pools[at], groups, seen_bank[at], bank[at])
            for seen_bank, bank in zip(seen.banks, held.banks, strict=True)
        ]
        layers.append(
            tuple(
                tuple(together(*(part[group] for part in parts)) for parts in mine)
                for group in range(len(groups))
            )
        )
    return tuple(layers)


def _held(layers: tuple[tuple[tuple[Any, ...], ...], ...], shared: tuple[Any, ...]) -> Held:
    """What has been written of them."""

    def written(bank: int, lies: Callable[[Any], Any]) -> Groups:
        return tuple(
            tuple(lies(only(banks[bank], banks[bank].WRITTEN)) for banks in groups)
            for groups in layers
        )

    banks = range(len(layers[0][0]))
    pooled = tuple(by_block(only(group, group.WRITTEN)) for group in shared)
    return Held(written(0, by_block), tuple(written(bank, by_row) for bank in banks), pooled)


def _num_queries(program: Program) -> list[int]:
    """Of each layer: how many of a chunk's last queries its head groups ask for at most."""
    return [
        max(kind(group.group).num_queries(group) for group in groups) for groups in program.groups
    ]


def _no_queries(program: Program) -> _Kept:
    """What `_step` gives as the last of each layer, before there is one."""
    sizes = program.layout.sizes
    shape = sizes.shape
    heads = shape.num_kv_heads * (shape.group_size + 2)
    nothing = jnp.zeros((sizes.batch, heads, shape.head_dim), sizes.dtype)
    return tuple(nothing if count == 1 else None for count in _num_queries(program))


def _queries(program: Program, last: _Kept, every: _Kept) -> Queries:
    """Of what was kept of each layer, what its head groups ask for."""
    shape, found = program.layout.sizes.shape, []
    for layer, groups in enumerate(program.groups):
        one, many = last[layer], every[layer]
        kept = many if one is None else one[None]
        queries = []
        for group, named in zip(groups, program.layout.groups[layer], strict=True):
            count = kind(group.group).num_queries(group)
            if not count or kept is None:
                queries.append(None)
                continue
            rows = kept[-count:, :, : shape.num_kv_heads * shape.group_size]
            rows = rows.reshape(*rows.shape[:2], shape.num_kv_heads, shape.group_size, -1)
            queries.append(jnp.stack([rows[:, :, head] for head in named.heads], axis=2))
        found.append(tuple(queries))
    return tuple(found)
