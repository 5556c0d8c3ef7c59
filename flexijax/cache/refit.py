"""A score's state fitted anew, where a request's prompt was too short to fit it.

A state is fitted on the prompt. That of a prompt of a few tokens says little of what is generated
after it: of a `Sketch`, all pages would score alike. It matters from the moment on at which a
request has more pages than are attended, so just before it the state is fitted once more, on the
full pages that there are, and those are summarised by the new one.

A prompt that has all the tokens which its score fits on is never fitted anew: its pages, and what
is kept of them, stay as they were written.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flexijax.cache.cache import LayerCache
from flexijax.cache.coded_offloaded import CodedOffloadedGroup
from flexijax.cache.coded_selected import CodedGroup
from flexijax.cache.layout import CacheLayout, GroupProgram
from flexijax.cache.memory import state_bytes
from flexijax.cache.offloaded import OffloadedGroup
from flexijax.cache.selected import SelectedGroup, scatter
from flexijax.cache.spread import row_program
from flexijax.cache.tiers import AnyHost, promote


class Row(NamedTuple):
    """One request of a batch: its place, blocks int32[P], and tokens held int32[]."""

    at: jax.Array
    blocks: jax.Array
    length: jax.Array


class RefitRule(NamedTuple):
    """Which requests are fitted anew, and when.

    begins: up to so many tokens every page is attended, whatever the scores' states. short: prompts
    of fewer tokens left states that say too little.
    """

    begins: int
    short: int


def refit_rule(layout: CacheLayout) -> RefitRule | None:
    """None where every page is attended at any length, or no score keeps a state."""
    sizes = layout.sizes
    groups = [group for *_, group in layout.all_groups() if state_bytes(layout, group)]
    rooms = [(group.room or group.attends or 0) * sizes.page_size for group in groups]
    begins = min(rooms, default=sizes.max_tokens)
    if begins >= sizes.max_tokens:
        return None
    fitted = [group.score.fit_tokens for group in groups if group.score is not None]
    return RefitRule(begins, min(begins, max(begins if n is None else n for n in fitted)))


def is_due(rule: RefitRule | None, steps: int, *, prompt: int, before: int) -> bool:
    """Whether a request is to be fitted anew after a chunk of steps; true once, if at all.

    steps: of a chunk. prompt: its tokens. before: tokens held before the chunk.
    """
    if rule is None or prompt >= rule.short or before + 2 * steps <= rule.begins:
        return False
    return before == prompt or before + steps <= rule.begins


def refit_layer(
    programs: tuple[GroupProgram, ...],
    layer_cache: LayerCache,
    at: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
) -> LayerCache:
    """One layer's head groups with the states of row `at`, int32[], fitted anew.

    layer_cache: donated. block_table: int32[B, P]; lengths: int32[B], tokens held.
    """
    groups, row = [], Row(at, block_table[at], lengths[at])
    for program, group, host in zip(programs, layer_cache.groups, layer_cache.host, strict=True):
        if program.group.score is not None:
            group = _with_row(program, group, host, row)
        groups.append(group)
    return dataclasses.replace(layer_cache, groups=tuple(groups))


def _with_row(program: GroupProgram, group: Any, host: AnyHost | None, row: Row) -> Any:
    if group.first is None:
        return _refitted(program, group, _full_pages(program, group, host, row), row)
    places = group.first.shape[1]
    for place in range(places):
        begins = group.first[0, place]
        length = jnp.where(begins < 0, 0, row.length)
        mine = Row(row.at * places + place, row.blocks + jnp.maximum(begins, 0), length)
        rows = row_program(program, places)
        group = _refitted(rows, group, _full_pages(rows, group, host, mine), mine)
    return group


def _refitted(program: GroupProgram, group: Any, k_pages: jax.Array, row: Row) -> Any:
    """k_pages [P', K, page, H]: the row's first pages, of which the full ones count."""
    sizes, score = program.sizes, program.score
    full = row.length // sizes.page_size
    state = score.fit(k_pages, full * sizes.page_size)
    page = jnp.arange(k_pages.shape[0], dtype=jnp.int32)
    at = jnp.where(page < full, row.blocks[: len(page)], sizes.blocks)  # beyond: dropped
    return dataclasses.replace(
        group,
        summaries=scatter(group.summaries, at, score.summarize(k_pages, state)),
        score_state=scatter(group.score_state, row.at, state),
    )


def _full_pages(program: GroupProgram, group: Any, host: AnyHost | None, row: Row) -> jax.Array:
    """The row's first pages [P', K, page, H], read from where all of them are."""
    sizes = program.sizes
    room = program.group.room or program.group.attends or 0
    # More than these it has only where it is fitted too late, after its first chunk of steps.
    count = min(sizes.pages, room + -(-sizes.chunk_steps // sizes.page_size))
    blocks = row.blocks[:count]
    if isinstance(group, SelectedGroup):
        return group.k[blocks]
    if isinstance(group, CodedGroup):
        assert program.group.codec is not None
        return program.group.codec.decode(group.codes[blocks], sizes.page)[0]
    assert isinstance(group, OffloadedGroup | CodedOffloadedGroup) and host is not None
    heads, width, page = group.k.shape[1], sizes.shape.head_dim, sizes.page_size
    full = jnp.arange(count, dtype=jnp.int32) < row.length // page
    load = jnp.broadcast_to(jnp.where(full, blocks, -1), (1, heads, count))
    k = jnp.zeros((1, heads, width, count, page), group.k.dtype)
    v = jnp.zeros((1, heads, count, page, width), group.v.dtype)
    k, _ = promote(k, v, host, load, transfer=program.transfer)
    return k[0].transpose(2, 0, 3, 1)
