"""The decode chunk: R steps, then one rerank; and the same steps teacher-forced."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.attention import DecodeAttention, DecodeState
from flexijax.cache.cache import Cache, Counters, HeadCounters, LayerCache, LayerHost, Pace
from flexijax.cache.rerank import filled_pages, find_slots, plan_rerank
from flexijax.cache.tiers import offload, promote
from flexijax.engine.prefill import Program
from flexijax.engine.sampling import SamplingRows, sample, step_keys
from flexijax.models.decoder import Params
from flexijax.policies.base import forced

LayerProgram: TypeAlias = Callable[..., Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where each row's request stands; a free row is inactive."""

    tokens: jax.Array  # int32[B], drawn last, not in the cache yet
    active: jax.Array  # bool[B]
    remaining: jax.Array  # int32[B], tokens it may still draw
    drawn: jax.Array  # int32[B], tokens it has drawn
    seeds: jax.Array  # uint32[B]
    stop_ids: jax.Array  # int32[B, stops], -1 for none
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a chunk of R steps drew; entries of rows that had ended are not `emitted`."""

    tokens: jax.Array  # int32[R, B]
    logprobs: jax.Array  # float32[R, B]
    emitted: jax.Array  # bool[R, B]


def decode_chunk(
    program: Program, params: Params, cache: Cache, rows: Rows
) -> tuple[Cache, Rows, Drawn]:
    """R = rerank_interval decode steps of all rows, then the rerank of slotted heads that are due.

    One program: cache is donated, and nothing goes to Python or to the host in between.
    """
    layers, lengths, rows, drawn, queries = decode_steps(
        program, params, cache.layers, cache.block_table, cache.lengths, rows
    )
    return rerank(program, cache, layers, lengths, rows.active, queries), rows, drawn


def decode_steps(
    program: Program,
    params: Params,
    layers: tuple[LayerCache, ...],
    block_table: jax.Array,
    lengths: jax.Array,
    rows: Rows,
) -> tuple[tuple[LayerCache, ...], jax.Array, Rows, Drawn, tuple[jax.Array, ...]]:
    """R = rerank_interval decode steps of all rows, without the rerank; layers are donated.

    block_table: int32[B, P]; lengths: int32[B].
    Returns layers, lengths, rows, what was drawn, and the last queries of the slotted heads, per
    layer [B, K_s, G, H].
    """

    def step(carry, _):
        layers, lengths, rows, _ = carry
        layers, logits, queries = _step(
            program, params, layers, block_table, lengths, rows.tokens, rows.active
        )
        token, logprob = sample(logits, rows.sampling, step_keys(rows.seeds, rows.drawn))
        active = rows.active
        stopped = (token[:, None] == rows.stop_ids).any(-1) | (rows.remaining <= 1)
        count = active.astype(jnp.int32)
        rows = dataclasses.replace(
            rows,
            tokens=jnp.where(active, token, rows.tokens),
            active=active & ~stopped,
            remaining=rows.remaining - count,
            drawn=rows.drawn + count,
        )
        return (layers, lengths + count, rows, queries), Drawn(token, logprob, active)

    carry = (layers, lengths, rows, _no_queries(program))
    (layers, lengths, rows, queries), drawn = lax.scan(
        step, carry, None, length=program.rerank_interval
    )
    return layers, lengths, rows, drawn, queries


def forced_steps(
    program: Program,
    params: Params,
    layers: tuple[LayerCache, ...],
    block_table: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[tuple[LayerCache, ...], jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """As `decode_steps` on given tokens, for comparing policies on one and the same text.

    tokens: int32[R, B], fed in order; active: bool[B].
    Returns layers, lengths, the logits float32[R, B, V] of what would come after each token, and
    the last queries.
    """

    def step(carry, token):
        layers, lengths, _ = carry
        layers, logits, queries = _step(
            program, params, layers, block_table, lengths, token, active
        )
        return (layers, lengths + active.astype(jnp.int32), queries), logits

    carry = (layers, lengths, _no_queries(program))
    (layers, lengths, queries), logits = lax.scan(step, carry, tokens)
    return layers, lengths, logits, queries


def _step(
    program: Program,
    params: Params,
    layers: tuple[LayerCache, ...],
    block_table: jax.Array,
    lengths: jax.Array,
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[tuple[LayerCache, ...], jax.Array, tuple[jax.Array, ...]]:
    """One token per row: (layers, logits float32[B, V], queries of the slotted heads)."""
    attend = DecodeAttention(program.layout, program.policy, program.implementation)
    state = DecodeState(layers, block_table, lengths, active, ())
    x, state = program.decoder.hidden(params, tokens[:, None], lengths[:, None], attend, state)
    queries = tuple(q.astype(program.layout.dtype) for q in state.queries)
    return state.layers, program.decoder.logits(params, x[:, 0]), queries


def _no_queries(program: Program) -> tuple[jax.Array, ...]:
    layout = program.layout
    shape = layout.shape
    return tuple(
        jnp.zeros(
            (layout.rows, len(layout.slotted(layer)), shape.group_size, shape.head_dim),
            layout.dtype,
        )
        for layer in range(shape.num_layers)
    )


def rerank(
    program: Program,
    cache: Cache,
    layers: tuple[LayerCache, ...],
    lengths: jax.Array,
    active: jax.Array,
    queries: tuple[jax.Array, ...],
    layer: LayerProgram | None = None,
) -> Cache:
    """The rerank of every layer after R steps: `cache` is the one from before them.

    layers, lengths, queries: of `decode_steps`. active: bool[B]; rows that have ended take no part
    and keep what they hold until they are reused. layer: runs `rerank_layer`, by default inlined.
    """
    run = layer or cast(LayerProgram, functools.partial(rerank_layer, program))
    counters = cache.counters
    tally = (counters.promoted, counters.offloaded)
    reranks = counters.reranks
    if any(host is not None for host in cache.host):
        reranks = reranks + active.astype(jnp.int32)
    new_layers, hosts, heads = [], [], []
    for held, host, counted, q in zip(layers, cache.host, counters.heads, queries, strict=True):
        if host is not None:
            held, host, tally, counted = run(
                held, host, tally, counted, cache.block_table, cache.lengths, lengths, active, q
            )
        new_layers.append(held)
        hosts.append(host)
        heads.append(counted)
    promoted, offloaded = tally
    return Cache(
        layers=tuple(new_layers),
        host=tuple(hosts),
        block_table=cache.block_table,
        lengths=lengths,
        counters=Counters(reranks, promoted, offloaded, tuple(heads)),
    )


def rerank_layer(
    program: Program,
    held: LayerCache,
    host: LayerHost,
    tally: tuple[jax.Array, jax.Array],
    counted: HeadCounters,
    block_table: jax.Array,
    before: jax.Array,
    lengths: jax.Array,
    active: jax.Array,
    queries: jax.Array,
) -> tuple[LayerCache, LayerHost, tuple[jax.Array, jax.Array], HeadCounters]:
    """Offloads the pages that filled up, then brings the newly chosen ones into the slots.

    held, host, tally, counted: donated. tally: pages promoted and offloaded so far, int32[B] each.
    before, lengths: int32[B], tokens held before and after the steps. queries: [B, K_s, G, H].
    Heads that are not due keep what is in their slots, and pages that filled up there are offloaded
    all the same. Returns the new held, host, tally and counted.
    """
    layout, score = program.layout, program.policy.score
    assert score is not None and held.slot_page is not None
    assert held.slots_k is not None and held.slots_v is not None
    page_size = layout.page_size
    most = -(-program.rerank_interval // page_size)
    lengths = jnp.where(active, lengths, 0)
    filled = filled_pages(before, lengths, page_size=page_size, count=most)  # [B, E]
    block = jnp.take_along_axis(block_table, jnp.maximum(filled, 0), axis=1)
    slot = jnp.stack([find_slots(held.slot_page, filled[:, e]) for e in range(most)], axis=-1)
    slot = jnp.where((filled >= 0)[:, None], slot, -1)  # [B, K_s, E]
    store = jnp.where(filled >= 0, block, -1)
    host = offload(host, held.slots_k, held.slots_v, store, slot, transfer=program.transfer)
    summaries = held.slotted_summaries
    for e in range(most):
        source = jnp.maximum(slot[:, :, e], 0)[:, :, None, None, None]
        keys = jnp.take_along_axis(held.slots_k, source, axis=3)[:, :, :, 0]  # [B, K_s, H, page]
        at = jnp.where(filled[:, e] >= 0, block[:, e], layout.blocks)
        rows = score.summarize(keys.swapaxes(-1, -2), held.slotted_state)
        summaries = jax.tree.map(
            lambda pool, new, at=at: pool.at[at].set(new, mode="drop"), summaries, rows
        )
    scores = score.scores(
        queries,
        summaries,
        held.slotted_state,
        block_table,
        lengths,
        page_size=page_size,
        scale=layout.shape.scale,
        implementation=program.implementation,
    )
    chosen = program.policy.plan(forced(scores, lengths, page_size=page_size))
    due, since = _due(program, held.pace, before, lengths, active[:, None], counted.reranks.shape)
    plan = plan_rerank(
        chosen, held.slot_page, lengths, since, pages=layout.pages, page_size=page_size
    )
    wanted = jnp.where(due[..., None], plan.load, -1)
    table = jnp.broadcast_to(block_table[:, None], (layout.rows, wanted.shape[1], layout.pages))
    load = jnp.take_along_axis(table, jnp.maximum(wanted, 0), axis=2)
    slots_k, slots_v = promote(
        held.slots_k,
        held.slots_v,
        host,
        jnp.where(wanted < 0, -1, load),
        transfer=program.transfer,
    )
    held = dataclasses.replace(
        held,
        slots_k=slots_k,
        slots_v=slots_v,
        slot_page=jnp.where(due[..., None], plan.slot_page, held.slot_page),
        slotted_summaries=summaries,
        pace=_paced(program, held.pace, due, plan.rco),
    )
    promoted = jnp.where(due, plan.promoted, 0).sum(1, dtype=jnp.int32)
    offloaded = (slot >= 0).sum((1, 2), dtype=jnp.int32)
    tally = (tally[0] + promoted, tally[1] + offloaded)
    chose = due & ~jnp.isnan(plan.rco)
    counted = HeadCounters(
        reranks=counted.reranks + due.astype(jnp.int32),
        overlap=counted.overlap + jnp.where(due, plan.overlap, 0.0),
        rco=counted.rco + jnp.where(chose, plan.rco, 0.0),
        choices=counted.choices + chose.astype(jnp.int32),
    )
    return held, host, tally, counted


def _due(
    program: Program,
    pace: Pace | None,
    before: jax.Array,
    lengths: jax.Array,
    active: jax.Array,
    shape: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Which heads are reranked now, bool[B, K_s], and tokens held at their last, int32[B, K_s].

    before, lengths: int32[B]; active: bool[B, 1]; shape: (B, K_s).
    """
    if pace is None:
        return jnp.broadcast_to(active, shape), jnp.broadcast_to(before[:, None], shape)
    due = active & (pace.wait <= program.rerank_interval)
    return due, lengths[:, None] - pace.interval


def _paced(program: Program, pace: Pace | None, due: jax.Array, rco: jax.Array) -> Pace | None:
    """The pace after the rerank of the heads `due`, bool[B, K_s]."""
    intervals = program.policy.intervals
    if pace is None or intervals is None:
        return pace
    interval = jnp.where(due, intervals.following(pace.interval, rco), pace.interval)
    return Pace(interval, jnp.where(due, interval, pace.wait - program.rerank_interval))
