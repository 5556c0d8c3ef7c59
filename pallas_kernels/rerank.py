"""The scheduler step: which pages stay in the slots, which come in, which leave."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What one rerank of a group of offloaded heads does.

    slot_page: int32[B, K, S], the page in each slot afterwards. Slots of pages that will begin
    before the next rerank already name them. load: int32[B, K, S], the page to bring from the host
    into each slot, -1 where nothing comes. promoted: int32[B, K], pages that come. overlap:
    float32[B, K], the share of chosen pages that were already resident. rco: float32[B, K], what
    profiles measure: the share that had been chosen at the last rerank too, corrected for chance;
    NaN where there were no more pages than are chosen.
    """

    slot_page: jax.Array
    load: jax.Array
    promoted: jax.Array
    overlap: jax.Array
    rco: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RerankStats:
    """Reranks and moves of each head since its request was admitted; see `Plan`."""

    reranks: jax.Array  # int32[B, K]
    overlap: jax.Array  # float32[B, K], sum
    rco: jax.Array  # float32[B, K], sum over those reranks at which there was a choice
    choices: jax.Array  # int32[B, K], how many those were
    promoted: jax.Array  # int32[B, K], pages host -> device
    offloaded: jax.Array  # int32[B, K], pages device -> host after the prompt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reranked:
    """What is left of a rerank when it is planned: where pages go, and what is counted of it.

    slot_page: int32[B, K, S], as in `Plan`; heads that are not due keep theirs. load:
    int32[B, K, S], the block to bring into each slot, -1 where nothing comes. rco: float32[B, K],
    as in `Plan`, anything of heads that are not due. stats: with this rerank counted.
    """

    slot_page: jax.Array
    load: jax.Array
    rco: jax.Array
    stats: RerankStats


def plan_rerank(
    chosen: jax.Array,
    slot_page: jax.Array,
    lengths: jax.Array,
    since: jax.Array,
    *,
    pages: int,
    page_size: int,
) -> Plan:
    """Assigns chosen pages to slots so that only pages not yet resident move.

    chosen: int32[B, K, n], pages to be resident, -1 for none; the newest page is among them.
    slot_page: int32[B, K, S], pages in the slots now, -1 for none. lengths: int32[B], tokens held,
    0 for a free row, whose slots become empty. since: int32[B, K], tokens held at the last rerank.
    pages: P. Resident pages keep their slot; the others fill the freed slots in ascending order,
    and behind them the pages that begin next.

        chosen [0, 3, 9], slots [0, 1, 9, 2], newest page 9
        -> slot_page [0, 3, 9, 10], load [-1, 3, -1, -1], promoted 1
    """
    slots = slot_page.shape[-1]
    wanted = _members(chosen, pages)  # bool[B, K, P]
    held = (slot_page * page_size < lengths[:, None, None]) & (slot_page >= 0)
    resident = _members(jnp.where(held, slot_page, -1), pages)
    stays = held & _take(wanted, slot_page)
    missing = wanted & ~resident

    # Pages beyond the newest take whatever slots are left, in the order in which they begin.
    newest = lax.div(lengths - 1, page_size)
    page = jnp.arange(pages, dtype=jnp.int32)[None, None]
    begins = (page > newest[:, None, None]) & (lengths > 0)[:, None, None]
    incoming = missing | begins
    order = jnp.cumsum(incoming, axis=-1) - 1  # rank of each incoming page
    # The page of each rank: searching the running count needs no scatter.
    free_rank = jnp.cumsum(~stays, axis=-1) - 1  # [B, K, S]
    count = order[..., -1:] + 1
    # Unrolled: on a GPU a loop would leave the graph that the rest is launched as.
    search = functools.partial(jnp.searchsorted, method="scan_unrolled")
    found = jax.vmap(jax.vmap(search))(order, free_rank)
    new_page = jnp.where(free_rank < count, found, -1).astype(jnp.int32)
    assigned = jnp.where(stays, slot_page, new_page)
    comes = ~stays & (assigned >= 0) & _take(missing, assigned)
    count, begun = wanted.sum(-1), -(-lengths // page_size)
    overlap = (wanted & resident).sum(-1) / jnp.maximum(count, 1)
    # The slots hold the last choice, and pages that began after it.
    older = page * page_size < since[..., None]
    again = (wanted & resident & older).sum(-1) / jnp.maximum(count, 1)
    chance = count / jnp.maximum(begun, 1)[:, None]
    chose = (count > 0) & (chance < 1)
    rco = jnp.where(chose, (again - chance) / jnp.where(chose, 1 - chance, 1.0), jnp.nan)
    assert assigned.shape[-1] == slots
    return Plan(
        slot_page=assigned,
        load=jnp.where(comes, assigned, -1),
        promoted=comes.sum(-1, dtype=jnp.int32),
        overlap=overlap.astype(jnp.float32),
        rco=rco.astype(jnp.float32),
    )


def _members(pages_of: jax.Array, pages: int) -> jax.Array:
    """int32[B, K, n] -> bool[B, K, P]: which pages are named; -1 names none."""
    row = jnp.arange(pages_of.shape[0])[:, None, None]
    head = jnp.arange(pages_of.shape[1])[None, :, None]
    at = jnp.where(pages_of < 0, pages, pages_of)  # out of bounds is dropped, -1 would wrap
    empty = jnp.zeros((*pages_of.shape[:2], pages), bool)
    return empty.at[row, head, at].set(True, mode="drop")


def _take(of_page: jax.Array, page: jax.Array) -> jax.Array:
    """of_page [B, K, P] at page int32[B, K, S]; negative pages give whatever page 0 has."""
    return jnp.take_along_axis(of_page, jnp.maximum(page, 0), axis=-1)
