"""The scheduler step of a rerank in plain XLA, from `rerank.plan_rerank`."""

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.filled import find_slots
from flexijax.pallas_kernels.rerank import Reranked, RerankStats, plan_rerank


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
    """See `dispatch_rerank.rerank`; XLA orders its own operations."""
    heads, pages = chosen.shape[:2], block_table.shape[1]
    since, due = jnp.broadcast_to(since, heads), jnp.broadcast_to(due > 0, heads)
    plan = plan_rerank(chosen, slot_page, lengths, since, pages=pages, page_size=page_size)
    wanted = jnp.where(due[..., None], plan.load, -1)
    blocks = jnp.broadcast_to(block_table[:, None], (*heads, pages))
    load = jnp.take_along_axis(blocks, jnp.maximum(wanted, 0), axis=2)
    chose = due & ~jnp.isnan(plan.rco)
    offloaded = find_slots(slot_page, filled_page) >= 0
    return Reranked(
        slot_page=jnp.where(due[..., None], plan.slot_page, slot_page),
        load=jnp.where(wanted < 0, -1, load),
        rco=plan.rco,
        stats=RerankStats(
            reranks=stats.reranks + due.astype(jnp.int32),
            overlap=stats.overlap + jnp.where(due, plan.overlap, 0.0),
            rco=stats.rco + jnp.where(chose, plan.rco, 0.0),
            choices=stats.choices + chose.astype(jnp.int32),
            promoted=stats.promoted + jnp.where(due, plan.promoted, 0),
            offloaded=stats.offloaded + offloaded.sum(-1, dtype=jnp.int32),
        ),
    )
