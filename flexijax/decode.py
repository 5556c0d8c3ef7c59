"""The decode chunk: R steps and one rerank in one program, and the same steps teacher-forced."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.attention import DecodeAttention, DecodeState
from flexijax.cache import Cache, Counters, LayerCache, LayerHost
from flexijax.models.decoder import Params
from flexijax.policy import forced
from flexijax.prefill import Program
from flexijax.sampling import SamplingRows, sample, step_keys
from flexijax.schedule import filled_pages, find_slots, plan_rerank
from flexijax.tiers import offload, promote


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
    """R = rerank_interval decode steps of all rows, then the rerank of the slotted heads.

    cache and rows are donated; nothing goes to Python or to the host in between.
    """

    def step(carry, _):
        layers, lengths, rows, _ = carry
        layers, logits, queries = _step(program, params, cache, layers, lengths, rows.tokens, rows.active)
        token, logprob = sample(logits, rows.sampling, step_keys(rows.seeds, rows.drawn))
        active = rows.active
        stopped = (token[:, None] == rows.stop_ids).any(-1) | (rows.remaining <= 1)
        lengths = lengths + active.astype(jnp.int32)
        rows = dataclasses.replace(
            rows,
            tokens=jnp.where(active, token, rows.tokens),
            active=active & ~stopped,
            remaining=rows.remaining - active.astype(jnp.int32),
            drawn=rows.drawn + active.astype(jnp.int32),
        )
        return (layers, lengths, rows, queries), Drawn(token, logprob, active)

    carry = (cache.layers, cache.lengths, rows, _no_queries(program))
    (layers, lengths, rows, queries), drawn = lax.scan(
        step, carry, None, length=program.rerank_interval
    )
    cache = _rerank(program, cache, layers, lengths, rows.active, queries)
    return cache, rows, drawn


def forced_chunk(
    program: Program, params: Params, cache: Cache, tokens: jax.Array, active: jax.Array
) -> tuple[Cache, jax.Array]:
    """R steps on given tokens, for comparing policies on one and the same text.

    tokens: int32[R, B], fed in order; active: bool[B]. cache is donated.
    Returns the cache and the logits float32[R, B, V] of what would come after each token.
    """

    def step(carry, token):
        layers, lengths, _ = carry
        layers, logits, queries = _step(program, params, cache, layers, lengths, token, active)
        return (layers, lengths + active.astype(jnp.int32), queries), logits

    carry = (cache.layers, cache.lengths, _no_queries(program))
    (layers, lengths, queries), logits = lax.scan(step, carry, tokens)
    return _rerank(program, cache, layers, lengths, active, queries), logits


def _step(
    program: Program,
    params: Params,
    cache: Cache,
    layers: tuple[LayerCache, ...],
    lengths: jax.Array,
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[tuple[LayerCache, ...], jax.Array, tuple[jax.Array, ...]]:
    """One token per row: (layers, logits float32[B, V], queries of the slotted heads)."""
    attend = DecodeAttention(program.layout, program.policy, program.implementation)
    state = DecodeState(layers, cache.block_table, lengths, active, ())
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


def _rerank(
    program: Program,
    cache: Cache,
    layers: tuple[LayerCache, ...],
    lengths: jax.Array,
    active: jax.Array,
    queries: tuple[jax.Array, ...],
) -> Cache:
    """Offloads the pages that filled up, then brings the newly chosen ones into the slots.

    Rows that are not active any more take no part: they keep what they hold until they are reused.
    """
    layout = program.layout
    counters = cache.counters
    new_layers, hosts, kept = [], [], []
    promoted = offloaded = jnp.zeros_like(counters.promoted)
    for layer in range(layout.shape.num_layers):
        held, host = layers[layer], cache.host[layer]
        if host is not None:
            held, host, moved = _rerank_layer(
                program, cache, held, host, lengths, active, queries[layer]
            )
            promoted += moved.promoted
            offloaded += moved.offloaded
            kept.append(counters.kept[layer] + moved.overlap)
        else:
            kept.append(None)
        new_layers.append(held)
        hosts.append(host)
    return Cache(
        layers=tuple(new_layers),
        host=tuple(hosts),
        block_table=cache.block_table,
        lengths=lengths,
        counters=Counters(
            reranks=counters.reranks + active.astype(jnp.int32),
            promoted=counters.promoted + promoted,
            offloaded=counters.offloaded + offloaded,
            kept=tuple(kept),
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Moved:
    promoted: jax.Array  # int32[B]
    offloaded: jax.Array  # int32[B]
    overlap: jax.Array  # float32[B, K_s]


def _rerank_layer(
    program: Program,
    cache: Cache,
    held: LayerCache,
    host: LayerHost,
    lengths: jax.Array,
    active: jax.Array,
    queries: jax.Array,
) -> tuple[LayerCache, LayerHost, _Moved]:
    layout, score = program.layout, program.policy.score
    assert score is not None and held.slot_page is not None
    assert held.slots_k is not None and held.slots_v is not None
    page_size = layout.page_size
    most = -(-program.rerank_interval // page_size)
    lengths = jnp.where(active, lengths, 0)
    filled = filled_pages(cache.lengths, lengths, page_size=page_size, count=most)  # [B, E]
    block = jnp.take_along_axis(cache.block_table, jnp.maximum(filled, 0), axis=1)
    slot = jnp.stack([find_slots(held.slot_page, filled[:, e]) for e in range(most)], axis=-1)
    slot = jnp.where((filled >= 0)[:, None], slot, -1)  # [B, K_s, E]
    store = jnp.where(filled >= 0, block, -1)
    host = offload(
        host, held.slots_k, held.slots_v, store, slot, transfer=program.transfer
    )
    summaries = held.slotted_summaries
    for e in range(most):
        source = jnp.maximum(slot[:, :, e], 0)[:, :, None, None, None]
        keys = jnp.take_along_axis(held.slots_k, source, axis=3)[:, :, :, 0]  # [B, K_s, H, page]
        at = jnp.where(filled[:, e] >= 0, block[:, e], layout.blocks)
        rows = score.summarize(keys.swapaxes(-1, -2))
        summaries = jax.tree.map(
            lambda pool, new, at=at: pool.at[at].set(new, mode="drop"), summaries, rows
        )
    scores = score.scores(
        queries,
        summaries,
        cache.block_table,
        lengths,
        page_size=page_size,
        implementation=program.implementation,
    )
    chosen = program.policy.plan(forced(scores, lengths, page_size=page_size))
    plan = plan_rerank(chosen, held.slot_page, lengths, pages=layout.pages, page_size=page_size)
    table = jnp.broadcast_to(
        cache.block_table[:, None], (layout.rows, plan.load.shape[1], layout.pages)
    )
    load = jnp.where(
        plan.load < 0, -1, jnp.take_along_axis(table, jnp.maximum(plan.load, 0), axis=2)
    )
    slots_k, slots_v = promote(
        held.slots_k, held.slots_v, host, load, transfer=program.transfer
    )
    slot_page = jnp.where(active[:, None, None], plan.slot_page, held.slot_page)
    held = dataclasses.replace(
        held, slots_k=slots_k, slots_v=slots_v, slot_page=slot_page, slotted_summaries=summaries
    )
    overlap = jnp.where(active[:, None], plan.overlap, 0.0)
    return held, host, _Moved(plan.promoted, (slot >= 0).sum((1, 2), dtype=jnp.int32), overlap)
