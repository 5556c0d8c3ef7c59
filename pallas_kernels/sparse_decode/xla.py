"""Decode attention in plain XLA, in the contractions that run fastest on a CPU.

Measured at 90 heads, 64 channels, float32, two cores: keys stored [H, S] instead of [S, H] make a
decode step's two products 1.5 times as fast, at 1 thousand and at 8 thousand keys alike; multiply
and sum instead of a dot is 2 to 4 times slower. A head's three queries one after the other are 1.3
to 2 times as fast as together, from two requests to eight, and as fast to a twentieth faster at one
request of a thousand keys; at one of 3 thousand or more, together takes 0.82 to 0.96 of the time.
"""

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.page_codes.xla import decode

# Queries of a head up to which they do better one at a time, but for one request of many keys.
_FEW_QUERIES = 4
_MANY_KEYS = 2048


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_ids: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `dispatch.paged_decode`."""
    batch, heads, _ = block_ids.shape
    page, width = k_pages.shape[2:]
    rows = _pool_rows(block_ids, len(k_pages))
    counts = jnp.where(block_ids >= 0, token_counts, 0)
    pools = tuple(pool.reshape(-1, page * width) for pool in (k_pages, v_pages))

    def attend(of: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, rows, counts = of
        k, v = (
            pool.at[rows].get(mode="promise_in_bounds").reshape(*rows.shape[:2], -1, width)
            for pool in pools
        )
        scores = _product("BKGH,BKSH->BKGS", q, k)
        return _attend(q, scores, (v,), counts, page, scale)

    if batch == 1 or platform.is_gpu():
        return attend((q, rows, counts))
    # One head of one request after the other: what is gathered stays in a core's own cache.
    made = lax.map(attend, tuple(x.reshape(-1, 1, 1, *x.shape[2:]) for x in (q, rows, counts)))
    out, lse = (x.reshape(batch, heads, *x.shape[3:]) for x in made)
    return out, lse


def coded_decode(
    q: jax.Array,
    codes: jax.Array,
    block_ids: jax.Array,
    *,
    page_size: int,
    bits: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `paged_decode` over full pages in codes uint32[blocks, K, words]; out still rotated."""
    rows = _pool_rows(block_ids, len(codes))
    words = codes.reshape(-1, codes.shape[2]).at[rows].get(mode="promise_in_bounds")
    # A piece of one array, which XLA would otherwise gather once for each of its parts.
    words = lax.optimization_barrier(words)
    counts = jnp.where(block_ids >= 0, page_size, 0)
    return coded_slot_decode(q, (words,), counts, page_size=page_size, bits=bits, scale=scale)


def coded_slot_decode(
    q: jax.Array,
    banks: tuple[jax.Array, ...],
    token_counts: jax.Array,
    *,
    page_size: int,
    bits: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `banked_slot_decode` over full pages, uint32[b, K, S, words]; out still rotated."""
    scores, values = [], []
    for queries, words in zip(jnp.split(q, len(banks)), banks, strict=True):
        made = decode(words, page=page_size, width=q.shape[-1], bits=bits)
        # Or each query's product would decode all of it anew, and take long to compile.
        k, v = lax.optimization_barrier(
            tuple(x.astype(q.dtype).reshape(*words.shape[:2], -1, q.shape[-1]) for x in made)
        )
        scores.append(_product("BKGH,BKSH->BKGS", queries, k))
        values.append(v)
    return _attend(q, jnp.concatenate(scores), tuple(values), token_counts, page_size, scale)


def slot_decode(
    q: jax.Array,
    k_slots: jax.Array,
    v_slots: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """See `dispatch.slot_decode`."""
    return banked_slot_decode(q, (k_slots,), (v_slots,), token_counts, scale=scale)


def banked_slot_decode(
    q: jax.Array,
    k_banks: tuple[jax.Array, ...],
    v_banks: tuple[jax.Array, ...],
    token_counts: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """As `slot_decode` over slots that lie apart, those of equally many rows in each bank."""
    rows, heads, slots, page, width = v_banks[0].shape
    k = (bank.reshape(rows, heads, width, slots * page) for bank in k_banks)
    v = tuple(bank.reshape(rows, heads, slots * page, width) for bank in v_banks)
    queries = jnp.split(q, len(v))
    scores = [_product("BKGH,BKHS->BKGS", *of) for of in zip(queries, k, strict=True)]
    return _attend(q, jnp.concatenate(scores), v, token_counts, page, scale)


def _pool_rows(block_ids: jax.Array, blocks: int) -> jax.Array:
    """Rows of a pool [blocks * K, ...] that hold the pages int32[B, K, n], -1 for any.

    One row a page of a head: as a pool of pages of heads, the same gather takes twice the time. In
    bounds once and for all: the gather would see to that element by element.
    """
    heads = block_ids.shape[1]
    block = jnp.clip(block_ids, 0, blocks - 1)
    return block * heads + jnp.arange(heads, dtype=block.dtype)[:, None]


def _attend(
    q: jax.Array,
    scores: jax.Array,
    v: tuple[jax.Array, ...],
    counts: jax.Array,
    page: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the counted tokens of scores float32[B, K, G, S], then the product with v.

    v: [b, K, S, H] of each bank of rows.
    """
    valid = (jnp.arange(page) < counts[..., None]).reshape(*counts.shape[:2], 1, -1)  # [B, K, 1, S]
    logits = jnp.where(valid, scores * scale, -jnp.inf)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    finite = jnp.where(jnp.isneginf(highest), 0.0, highest)  # a head that reads nothing
    weights = jnp.exp(logits - finite)
    total = weights.sum(axis=-1)
    weights, axes = weights.astype(v[0].dtype), "BKGS,BKSH->BKGH"
    of_banks = zip(jnp.split(weights, len(v)), v, strict=True)
    out = jnp.concatenate([_product(axes, *of) for of in of_banks])

    def cleared() -> jax.Array:
        read = jnp.where(valid[:, :, 0, :, None], jnp.concatenate(v), 0)
        return _product(axes, weights, read)

    # What stands behind the counted tokens weighs 0, but 0 * NaN is NaN. Clearing it always would
    # cost one more pass over v, so that is done only when something leaked.
    out = lax.cond(jnp.isnan(out).any(), cleared, lambda: out)
    # A head that reads nothing gives 0; one that reads NaN must not, or nobody would see it.
    out = jnp.where(total[..., None] == 0, 0.0, out / jnp.maximum(total, 1e-30)[..., None])
    return out.astype(q.dtype), jnp.log(total) + finite[..., 0]


def _product(axes: str, queries: jax.Array, of: jax.Array) -> jax.Array:
    """An einsum "BKG..,BK..->BKG.." in float32."""
    group, keys = queries.shape[2], of.shape[axes.split("->")[0].split(",")[1].index("S")]
    long = len(queries) == 1 and keys > _MANY_KEYS
    if platform.is_gpu() or group > _FEW_QUERIES or long:
        return jnp.einsum(axes, queries, of, preferred_element_type=jnp.float32)
    one = axes.replace("G", "")
    made = (
        jnp.einsum(one, queries[:, :, query], of, preferred_element_type=jnp.float32)
        for query in range(group)
    )
    return jnp.stack(list(made), axis=2)
