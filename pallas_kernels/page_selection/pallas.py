"""Page selection as one kernel: ranks, what is always attended, and the best of the rest.

One program chooses for one KV head of one request. The least rank that is chosen is found bit by
bit: 32 counts over all pages, where a sort of them would take a hundred passes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton

# Pages of one thread, of which it holds ranks, keys and places in registers.
_THREAD_PAGES = 8
# `_sortable` of -inf.
_LOWEST = -0x7F800001


def select_pages(
    scores: jax.Array,
    lengths: jax.Array,
    scored: jax.Array,
    *,
    count: int,
    newer: int,
    page_size: int,
    sinks: int,
) -> jax.Array:
    """int32[B, K, n], ascending, then -1; see `dispatch.select_pages`."""
    batch, heads, group, pages = scores.shape
    padded, slots = pl.next_power_of_2(pages), pl.next_power_of_2(count + newer)

    def kernel(scores_ref, lengths_ref, scored_ref, out_ref):
        head, request = pl.program_id(0), pl.program_id(1)
        length = lengths_ref[request]
        newest = (length - 1) // page_size
        tail = jnp.minimum(scored_ref[request] // page_size, newest)
        page = jnp.arange(padded)
        begun = (page <= newest) & (length > 0)

        def score(g):
            at = scores_ref.at[request, head, g, page]
            return pltriton.load(at, mask=begun & (page < pages), other=-jnp.inf)

        ranks = score(0) if group == 1 else _log_mass(score, group)
        always = begun & ((page < sinks) | (page >= tail))
        key = _sortable(jnp.where(always, jnp.inf, jnp.where(begun, ranks, -jnp.inf)))
        room = count + jnp.minimum(newest - tail, newer)
        least = _nth_greatest(key, room)
        above, equal = key > least, key == least
        # Of equal ones the first, as many as there is room for.
        left = room - jnp.sum(above.astype(jnp.int32))
        equal &= jnp.cumsum(equal.astype(jnp.int32)) <= left
        chosen = (above | equal) & (key > _LOWEST)
        found = chosen.astype(jnp.int32)
        # Out of bounds for all others: interpret mode writes, and drops, what is masked too.
        place = jnp.where(chosen, jnp.cumsum(found) - 1, count + newer)
        pltriton.store(out_ref.at[request, head, place], page, mask=chosen)
        slot = jnp.arange(slots)
        free = (slot >= jnp.sum(found)) & (slot < count + newer)
        pltriton.store(
            out_ref.at[request, head, slot], jnp.full((slots,), -1, jnp.int32), mask=free
        )

    return platform.pallas_kernel(
        kernel,
        name="flexijax_select_pages",
        grid=(heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, heads, count + newer), jnp.int32),
        num_warps=min(16, max(1, padded // (32 * _THREAD_PAGES))),
        num_stages=1,
    )(scores, lengths, scored)


def _log_mass(score: Callable[[int], jax.Array], group: int) -> jax.Array:
    """Log of the sum over the query heads of each page's share: score(g) float32[P]."""
    peak = _share(score(0))
    total = jnp.where(peak == -jnp.inf, 0.0, 1.0)
    for g in range(1, group):
        share = _share(score(g))
        higher = jnp.maximum(peak, share)
        safe = jnp.where(higher == -jnp.inf, 0.0, higher)
        total = total * jnp.exp(peak - safe) + jnp.exp(share - safe)
        peak = higher
    return jnp.where(peak == -jnp.inf, -jnp.inf, peak + jnp.log(total))


def _share(log: jax.Array) -> jax.Array:
    """Logs float32[P] less the log of the sum of their exponentials."""
    highest = jnp.max(log)
    # A request without scored pages: -inf everywhere, and their difference no number.
    safe = jnp.where(highest == -jnp.inf, 0.0, highest)
    whole = safe + jnp.log(jnp.sum(jnp.exp(log - safe)))
    return jnp.where(log == -jnp.inf, -jnp.inf, log - whole)


def _sortable(x: jax.Array) -> jax.Array:
    """int32 in the order of the floats, of which none is NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _nth_greatest(key: jax.Array, n: jax.Array) -> jax.Array:
    """int32[]: the greatest value that at least n of key int32[P] reach."""

    def lower(i, found):
        tried = found + (jnp.int32(1) << (30 - i))
        return jnp.where(jnp.sum((key >= tried).astype(jnp.int32)) >= n, tried, found)

    positive = jnp.sum((key >= 0).astype(jnp.int32)) >= n
    lowest = jnp.where(positive, jnp.int32(0), jnp.int32(-(2**31)))
    return lax.fori_loop(0, 31, lower, lowest)
