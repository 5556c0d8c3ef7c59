"""Reading a prompt: fixed-size chunks over a dense workspace, then one commit into both tiers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.attention import PrefillAttention, PrefillState, Workspace
from flexijax.cache.cache import Cache, CacheLayout, LayerCache, LayerHost, Pace
from flexijax.cache.rerank import plan_rerank
from flexijax.cache.tiers import offload
from flexijax.models.decoder import DecoderLike, Params
from flexijax.pallas_kernels import platform
from flexijax.policies.base import Policy, forced

# Tokens in a chunk: enough for the matrix products to run at full rate, few enough for a progress
# bar that moves and for short prompts not to wait.
CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about a run; hashable, a static argument of each jitted function.

    rerank_interval: steps in one decode chunk, after which slotted heads are reranked: all of them,
    or those that are due by `policy.intervals`.
    """

    decoder: DecoderLike
    layout: CacheLayout
    policy: Policy
    rerank_interval: int
    implementation: str | None
    transfer: str | None

    @property
    def chunk(self) -> int:
        """Prompt tokens in one prefill chunk; divides the workspace."""
        return math.gcd(CHUNK, self.layout.pages * self.layout.page_size)


def new_workspace(layout: CacheLayout) -> Workspace:
    """A workspace for one prompt of up to `layout.pages` pages."""
    shape, tokens = layout.shape, layout.pages * layout.page_size
    device = platform.sharding()

    def zeros(*size: int) -> jax.Array:
        return jnp.zeros(size, layout.dtype, device=device)

    layers = range(shape.num_layers)
    heads, width = shape.num_kv_heads, shape.head_dim
    return Workspace(
        tuple(zeros(heads, width, tokens) for _ in layers),
        tuple(zeros(heads, tokens, width) for _ in layers),
    )


def prefill_chunk(
    program: Program,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    last: jax.Array,
    workspace: Workspace,
) -> tuple[Workspace, jax.Array, tuple[jax.Array, ...]]:
    """Runs a chunk of one prompt.

    tokens: int32[1, C], what stands behind index `last` is padding. start: int32[], tokens before
    the chunk. last: int32[]. workspace: donated.
    Returns the workspace, the last token's hidden state [1, D] and its queries per layer
    [1, K, G, H].
    """
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    state = PrefillState(workspace, start, last, ())
    attend = PrefillAttention(program.layout, program.implementation)
    x, state = program.decoder.hidden(params, tokens, positions, attend, state)
    x = lax.dynamic_index_in_dim(x, last, axis=1, keepdims=False)
    return state.workspace, x, state.queries


def commit(
    program: Program,
    cache: Cache,
    workspace: Workspace,
    row: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    queries: tuple[jax.Array, ...],
) -> Cache:
    """Moves a prompt from the workspace into row `row` of the cache (donated).

    blocks: int32[P], block of each page, used below ceil(length / page). length: int32[], tokens.
    queries: per layer [1, K, G, H] of the last token; they rank the slotted heads' pages.
    """
    layers, hosts = [], []
    for at, pair in enumerate(zip(cache.layers, cache.host, strict=True)):
        k, v = workspace.k[at], workspace.v[at]
        held, host = commit_layer(
            program, *pair, k, v, row, blocks, length, queries[at], *heads(program, at)
        )
        layers.append(held)
        hosts.append(host)
    return enter(
        dataclasses.replace(cache, layers=tuple(layers), host=tuple(hosts)), row, blocks, length
    )


def heads(program: Program, layer: int) -> tuple[jax.Array, jax.Array]:
    """A layer's paged and slotted heads, int32 each, as `commit_layer` takes them."""
    layout = program.layout
    return jnp.asarray(layout.paged[layer], jnp.int32), jnp.asarray(
        layout.slotted(layer), jnp.int32
    )


def enter(cache: Cache, row: jax.Array, blocks: jax.Array, length: jax.Array) -> Cache:
    """A cache whose row `row` holds `length` tokens in `blocks` and of which nothing is counted."""
    counters = cache.counters
    return dataclasses.replace(
        cache,
        block_table=cache.block_table.at[row].set(blocks),
        lengths=cache.lengths.at[row].set(length),
        counters=dataclasses.replace(
            counters,
            reranks=counters.reranks.at[row].set(0),
            promoted=counters.promoted.at[row].set(0),
            offloaded=counters.offloaded.at[row].set(0),
            heads=jax.tree.map(lambda count: count.at[row].set(0), counters.heads),
        ),
    )


def commit_layer(
    program: Program,
    held: LayerCache,
    host: LayerHost | None,
    k: jax.Array,
    v: jax.Array,
    row: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    queries: jax.Array,
    paged: jax.Array,
    slotted: jax.Array,
) -> tuple[LayerCache, LayerHost | None]:
    """One layer's share of `commit`; held and host are donated.

    k [K, H, S], v [K, S, H]: the layer's workspace. paged int32[K_u], slotted
    int32[K_s]: its heads of each kind, as arrays, so that layers with equal counts share a program.
    """
    layout = program.layout
    k = k.reshape(1, *k.shape[:2], layout.pages, layout.page_size)
    v = v.reshape(1, v.shape[0], layout.pages, layout.page_size, v.shape[2])
    page = jnp.arange(layout.pages, dtype=jnp.int32)
    used = -(-length // layout.page_size)
    if paged.size:
        table = jnp.where(page < used, blocks, layout.blocks)  # beyond: out of bounds, dropped
        held = _commit_paged(program, held, k[0, paged], v[0, paged], row, table, length)
    if slotted.size and host is None:
        held = _commit_full(held, k[:, slotted], v[:, slotted], row)
    elif slotted.size and host is not None:
        full = jnp.where(page < length // layout.page_size, blocks, -1)
        held, host = _commit_slotted(
            program,
            held,
            host,
            k[:, slotted],
            v[:, slotted],
            row,
            full,
            length,
            queries[:, slotted],
        )
    return held, host


def _commit_paged(
    program: Program,
    held: LayerCache,
    k: jax.Array,
    v: jax.Array,
    row: jax.Array,
    table: jax.Array,
    length: jax.Array,
) -> LayerCache:
    """k [K_u, H, P, page], v [K_u, P, page, H] into the rows `table` of the pools."""
    score = program.policy.score
    assert score is not None and held.pages_k is not None and held.pages_v is not None
    k_pages = k.transpose(2, 0, 3, 1)  # [P, K_u, page, H]
    state = score.fit(k_pages, length)
    return dataclasses.replace(
        held,
        pages_k=held.pages_k.at[table].set(k_pages, mode="drop"),
        pages_v=held.pages_v.at[table].set(v.swapaxes(0, 1), mode="drop"),
        paged_summaries=_scatter(held.paged_summaries, table, score.summarize(k_pages, state)),
        paged_state=_scatter(held.paged_state, row, state),
    )


def _commit_full(held: LayerCache, k: jax.Array, v: jax.Array, row: jax.Array) -> LayerCache:
    """k [1, K_s, H, P, page], v [1, K_s, P, page, H] into slots that cover every page."""
    assert held.slots_k is not None and held.slots_v is not None and held.slot_page is not None
    all_pages = jnp.arange(k.shape[3], dtype=jnp.int32)[None, None]
    return dataclasses.replace(
        held,
        slots_k=lax.dynamic_update_slice_in_dim(held.slots_k, k, row, axis=0),
        slots_v=lax.dynamic_update_slice_in_dim(held.slots_v, v, row, axis=0),
        slot_page=held.slot_page.at[row].set(
            jnp.broadcast_to(all_pages[0], held.slot_page.shape[1:])
        ),
    )


def _commit_slotted(
    program: Program,
    held: LayerCache,
    host: LayerHost,
    k: jax.Array,
    v: jax.Array,
    row: jax.Array,
    full: jax.Array,
    length: jax.Array,
    queries: jax.Array,
) -> tuple[LayerCache, LayerHost]:
    """Full pages to the host, the chosen ones and the newest straight into the slots.

    k [1, K_s, H, P, page], v [1, K_s, P, page, H]; full int32[P], block of each full page or -1.
    """
    layout, score = program.layout, program.policy.score
    assert score is not None
    assert held.slots_k is not None and held.slots_v is not None and held.slot_page is not None
    heads = k.shape[1]
    page = jnp.arange(layout.pages, dtype=jnp.int32)
    every = jnp.broadcast_to(page[None, None], (1, heads, layout.pages))
    host = offload(host, k, v, full[None], every, transfer=program.transfer)
    k_pages = k[0].transpose(2, 0, 3, 1)  # [P, K_s, page, H]
    state = score.fit(k_pages, length)
    rows = score.summarize(k_pages, state)
    at = jnp.where(full >= 0, full, layout.blocks)
    summaries = _scatter(held.slotted_summaries, at, rows)
    # Blocks of the newest page may not be in `full`; scoring it is not needed, it is forced.
    scores = score.scores(
        queries,
        summaries,
        jax.tree.map(lambda leaf: leaf[None], state),
        jnp.maximum(full, 0)[None],
        length[None],
        page_size=layout.page_size,
        scale=layout.shape.scale,
        implementation=program.implementation,
    )
    chosen = program.policy.plan(forced(scores, length[None], page_size=layout.page_size))
    empty = jnp.full((1, heads, layout.slots), -1, jnp.int32)
    plan = plan_rerank(
        chosen,
        empty,
        length[None],
        jnp.zeros((1, heads), jnp.int32),
        pages=layout.pages,
        page_size=layout.page_size,
    )
    source = jnp.maximum(plan.slot_page, 0)
    slot_k = jnp.take_along_axis(k, source[:, :, None, :, None], axis=3)
    slot_v = jnp.take_along_axis(v, source[:, :, :, None, None], axis=2)
    held = dataclasses.replace(
        held,
        slots_k=lax.dynamic_update_slice_in_dim(held.slots_k, slot_k, row, axis=0),
        slots_v=lax.dynamic_update_slice_in_dim(held.slots_v, slot_v, row, axis=0),
        slot_page=lax.dynamic_update_slice_in_dim(held.slot_page, plan.slot_page, row, axis=0),
        slotted_summaries=summaries,
        slotted_state=_scatter(held.slotted_state, row, state),
        pace=_first_pace(program, held.pace, row),
    )
    return held, host


def _first_pace(program: Program, pace: Pace | None, row: jax.Array) -> Pace | None:
    """The pace of a row whose prompt has just ranked its heads."""
    intervals = program.policy.intervals
    if pace is None or intervals is None:
        return pace
    first = intervals.first
    return Pace(pace.interval.at[row].set(first), pace.wait.at[row].set(first))


def _scatter(pools: Any, at: jax.Array, rows: Any) -> Any:
    return jax.tree.map(lambda pool, new: pool.at[at].set(new, mode="drop"), pools, rows)
