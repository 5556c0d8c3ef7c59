"""Page selection in plain XLA."""

import jax
import jax.numpy as jnp
from jax import lax


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
    """See `dispatch.select_pages`."""
    ranks = attended_first(page_ranks(scores), lengths, scored, page_size=page_size, sinks=sinks)
    best, chosen = lax.top_k(ranks, count + newer)
    newest, tail = _newest_and_tail(lengths, scored, page_size)
    room = count + jnp.minimum(newest - tail, newer)
    inside = jnp.arange(count + newer, dtype=jnp.int32) < room  # [B, n]
    return jnp.where(inside[:, None] & (best > -jnp.inf), chosen, -1).astype(jnp.int32)


def attended_first(
    ranks: jax.Array, lengths: jax.Array, scored: jax.Array, *, page_size: int, sinks: int
) -> jax.Array:
    """Ranks float32[B, K, P] with +inf for pages that are always attended, -inf where none is."""
    page = jnp.arange(ranks.shape[-1], dtype=jnp.int32)[None]
    newest, tail = _newest_and_tail(lengths, scored, page_size)
    begun = (page <= newest) & (lengths > 0)[:, None]
    always = begun & ((page < sinks) | (page >= tail))
    return jnp.where(always[:, None], jnp.inf, jnp.where(begun[:, None], ranks, -jnp.inf))


def _newest_and_tail(
    lengths: jax.Array, scored: jax.Array, page_size: int
) -> tuple[jax.Array, jax.Array]:
    """int32[B, 1] twice: the newest page, and the first that has no score, the newest at most."""
    newest = lax.div(lengths - 1, page_size)[:, None]
    return newest, jnp.minimum(lax.div(scored, page_size)[:, None], newest)


def page_ranks(scores: jax.Array) -> jax.Array:
    """What pages rank by: scores float32[B, K, G, P] -> float32[B, K, P]; see the reference."""
    if scores.shape[2] == 1:
        return scores[:, :, 0]
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # Not inf - inf where there is no page at all.
    shares = jnp.where(jnp.isneginf(scores), -jnp.inf, scores - total)
    return jax.nn.logsumexp(shares, axis=2) - jnp.log(float(scores.shape[2]))
