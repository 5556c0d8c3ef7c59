"""The scheduler step of a rerank in one kernel, one program a head.

The chosen pages and the slots are short lists, so what is asked of them is asked of all pairs, a
tile of chosen pages at a time: nothing is as long as the request. The page that comes into a free
slot is the one whose rank among those that come is the slot's among those that are free.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.rerank import Reranked, RerankStats

# Pairs of a chosen page and a slot that are compared at a time: what registers hold.
_PAIRS = 4096


def rerank(
    chosen: jax.Array,
    slot_page: jax.Array,
    lengths: jax.Array,
    since: jax.Array,
    due: jax.Array,
    block_table: jax.Array,
    filled_page: jax.Array,
    stats: RerankStats,
    *,
    page_size: int,
    after: tuple[jax.Array, ...],
) -> Reranked:
    """See `dispatch_rerank.rerank`."""
    batch, heads, count = chosen.shape
    slots, pages, entries = slot_page.shape[2], block_table.shape[1], filled_page.shape[1]
    width, columns = pl.next_power_of_2(slots), pl.next_power_of_2(count)
    tile = max(1, min(16, columns, _PAIRS // max(width, columns)))
    since_heads, due_heads = since.shape[1], due.shape[1]

    def kernel(chosen_ref, slot_ref, lengths_ref, since_ref, due_ref, table_ref, filled_ref, *rest):
        # chosen [B, K, n], slot_page [B, K, S], lengths [B], since and due [B, K] or [B, 1],
        # block_table [B, P], filled_page [B, E], the statistics [B, K]; written: slot_page, load
        # [B, K, S], rco and the statistics [B, K].
        old, (new_slot_ref, load_ref, rco_ref, *new) = RerankStats(*rest[:6]), rest[-9:]
        head, request = pl.program_id(0), pl.program_id(1)
        mine = (request, head)
        length = lengths_ref[request]
        last = since_ref[request, head if since_heads > 1 else 0]
        is_due = due_ref[request, head if due_heads > 1 else 0] > 0
        slot = jnp.arange(width)
        real = slot < slots
        page = pltriton.load(slot_ref.at[request, head, slot], mask=real, other=-1)
        held = jnp.where(page * page_size < length, page, -1)  # -1 where nothing has begun

        def part(index):
            """A tile of chosen pages, and which of them lies in which slot: [tile], [tile, S]."""
            at = index * tile + jnp.arange(tile)
            ids = pltriton.load(chosen_ref.at[request, head, at], mask=at < count, other=-1)
            return ids, (ids[:, None] == held[None, :]) & (ids >= 0)[:, None]

        def compare(index, sums):
            ids, match = part(index)
            resident = jnp.sum(match.astype(jnp.int32), axis=1)
            again = jnp.where(ids * page_size < last, resident, 0)
            named = (ids >= 0).astype(jnp.int32)
            found = (
                jnp.sum(match.astype(jnp.int32), axis=0),
                *map(jnp.sum, (named, resident, again)),
            )
            return tuple(total + more for total, more in zip(sums, found, strict=True))

        nothing, nought = jnp.zeros((width,), jnp.int32), jnp.int32(0)
        tiles = columns // tile
        sums = lax.fori_loop(0, tiles, compare, (nothing, nought, nought, nought))
        stays, named, resident, again = sums
        free = real & (stays == 0)
        place = jnp.cumsum(free.astype(jnp.int32), axis=0) - 1  # among the free slots
        at = jnp.arange(columns)
        every = pltriton.load(chosen_ref.at[request, head, at], mask=at < count, other=-1)

        def place_missing(index, coming):
            ids, match = part(index)
            missing = (ids >= 0) & (jnp.sum(match.astype(jnp.int32), axis=1) == 0)
            below = (every >= 0)[None, :] & (every[None, :] < ids[:, None])
            stay_below = (stays > 0)[None, :] & (page[None, :] < ids[:, None])
            rank = jnp.sum(below.astype(jnp.int32), axis=1)  # among those that come
            rank = rank - jnp.sum(stay_below.astype(jnp.int32), axis=1)
            goes = missing[:, None] & free[None, :] & (rank[:, None] == place[None, :])
            return coming + jnp.sum(jnp.where(goes, ids[:, None] + 1, 0), axis=0)

        coming = lax.fori_loop(0, tiles, place_missing, nothing) - 1  # int32[S], -1 for none
        comes = coming >= 0
        begun = lax.div(length + page_size - 1, page_size)
        # Behind the pages that come, those that begin next.
        begins = begun + place - (named - resident)
        reserved = free & (begins >= begun) & (begins < pages) & (length > 0)
        assigned = jnp.where(comes, coming, jnp.where(reserved, begins, -1))
        assigned = jnp.where(stays > 0, page, assigned)
        loads = comes & is_due
        block = pltriton.load(table_ref.at[request, jnp.maximum(coming, 0)], mask=loads, other=-1)
        assigned = jnp.where(is_due, assigned, page)
        pltriton.store(new_slot_ref.at[request, head, slot], assigned, mask=real)
        pltriton.store(load_ref.at[request, head, slot], block, mask=real)

        divisor = jnp.maximum(named, 1).astype(jnp.float32)
        all_pages = jnp.maximum(begun, 1)
        chose = (named > 0) & (named < all_pages)
        chance = named.astype(jnp.float32) / all_pages.astype(jnp.float32)
        rco = (again.astype(jnp.float32) / divisor - chance) / jnp.where(chose, 1 - chance, 1.0)
        rco_ref[mine] = jnp.where(chose, rco, jnp.nan)
        offloaded = nought
        for entry in range(entries):
            ids = filled_ref[request, entry]
            offloaded += jnp.max(jnp.where((page == ids) & (ids >= 0), 1, 0))
        counted = RerankStats(
            reranks=is_due.astype(jnp.int32),
            overlap=jnp.where(is_due, resident.astype(jnp.float32) / divisor, 0.0),
            rco=jnp.where(is_due & chose, rco, 0.0),
            choices=(is_due & chose).astype(jnp.int32),
            promoted=jnp.sum(loads.astype(jnp.int32)),
            offloaded=offloaded,
        )
        for ref, name in zip(new, vars(counted), strict=True):
            ref[mine] = getattr(old, name)[mine] + getattr(counted, name)

    arrays = (chosen, slot_page, lengths, since, due, block_table, filled_page)
    counts = tuple(vars(stats).values())
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (slot_page, slot_page, *counts)]
    new_slot_page, load, rco, *totals = platform.pallas_kernel(
        kernel,
        name="flexijax_rerank_plan",
        grid=(heads, batch),
        out_shape=[*like[:2], jax.ShapeDtypeStruct((batch, heads), jnp.float32), *like[2:]],
        num_warps=4 if width <= 128 else 8,
        aliases={1: 0, **{len(arrays) + at: 3 + at for at in range(len(counts))}},
    )(*arrays, *counts, *after)
    return Reranked(new_slot_page, load, rco, RerankStats(*totals))
