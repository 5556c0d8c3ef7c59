"""Flash decoding over chosen pages: through block ids (unstable heads) or in slots (stable heads).

One program attends one KV head of one request over a stretch of its pages, `block_tokens` tokens
at a time with a running softmax; the G query heads are the rows of the matrix products, padded to
the 16 rows of a tensor core. A head's pages are split over several programs, so that a batch of
one fills the GPU, and a second small kernel merges the parts by their log-sum-exp.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.online_softmax import (
    LOG2_E,
    empty_carry,
    load_query,
    normalized,
    softmax_over,
)
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sparse_decode.tuning import MIN_ROWS, TuningConfig


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_ids: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
    config: TuningConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, K, G, H] over pages [blocks, K, page, H]; see `dispatch.paged_decode`.

    block_ids and token_counts int32[B, K, n] -> out [B, K, G, H], lse float32[B, K, G].
    """
    blocks, heads, page, width = k_pages.shape
    rows = (blocks * heads * page, width)
    return _decode(
        q,
        k_pages.reshape(rows),
        v_pages.reshape(rows),
        block_ids,
        token_counts,
        page,
        scale,
        config,
    )


def slot_decode(
    q: jax.Array,
    k_slots: jax.Array,
    v_slots: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
    config: TuningConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [B, K, G, H] over a head's own slots; see `dispatch.slot_decode`.

    k_slots [B, K, H, S, page], v_slots [B, K, S, page, H], token_counts int32[B, K, S]
    -> out [B, K, G, H], lse float32[B, K, G].
    """
    batch, heads, width, slots, page = k_slots.shape
    k_matrix = k_slots.reshape(batch, heads, width, slots * page)
    v_rows = v_slots.reshape(-1, width)
    return _decode(q, k_matrix, v_rows, None, token_counts, page, scale, config)


def _decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    block_ids: jax.Array | None,
    counts: jax.Array,
    page: int,
    scale: float,
    config: TuningConfig | None,
) -> tuple[jax.Array, jax.Array]:
    """v is rows [pages * page, H]; k too with block_ids, without them [B, K, H, pages * page]."""
    batch, heads, group, width = q.shape
    pages = counts.shape[2]
    config = config or TuningConfig.choose(
        heads=batch * heads,
        tokens=pages * page,
        row_bytes=width * k.dtype.itemsize,
    )
    covered = config.block_tokens * config.steps * config.splits
    if covered < pages * page:
        raise ValueError(f"{config} covers {covered} tokens, fewer than the {pages * page} listed")
    parts = (config.splits, batch, heads, group)
    alone = config.splits == 1

    def kernel(*refs):
        q_ref, k_ref, v_ref, *ids_ref, counts_ref, out_ref, lse_ref = refs
        _attend(
            q_ref,
            k_ref,
            v_ref,
            ids_ref[0] if ids_ref else None,
            counts_ref,
            out_ref,
            lse_ref,
            page=page,
            scale=scale * LOG2_E,
            config=config,
        )

    out, lse = platform.pallas_kernel(
        kernel,
        name="flexijax_decode_slots" if block_ids is None else "flexijax_decode_pages",
        grid=(config.splits, heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((*parts, width), q.dtype if alone else jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )(q, k, v, *([] if block_ids is None else [block_ids]), counts)
    if alone:
        return out[0], lse[0]
    return merge_splits(out, lse, dtype=q.dtype)


def _attend(
    q_ref,  # [B, K, G, H]
    k_ref,  # [rows, H], or [B, K, H, n * page]
    v_ref,  # [rows, H]
    ids_ref,  # int32[B, K, n], or None
    counts_ref,  # int32[B, K, n]
    out_ref,  # [splits, B, K, G, H]
    lse_ref,  # float32[splits, B, K, G]
    *,
    page: int,
    scale: float,
    config: TuningConfig,
) -> None:
    split, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, num_heads, group, width = q_ref.shape
    pages = counts_ref.shape[2]
    rows = max(MIN_ROWS, pl.next_power_of_2(group))
    q = load_query(q_ref, (request, head), 0, group, rows, width).astype(k_ref.dtype)

    def source(index, listed):
        count = pltriton.load(counts_ref.at[request, head, index], mask=listed, other=0)
        if ids_ref is None:
            return count, (request * num_heads + head) * pages + index
        block_id = pltriton.load(ids_ref.at[request, head, index], mask=listed, other=0)
        return jnp.where(block_id >= 0, count, 0), block_id * num_heads + head

    carry = softmax_over(
        q,
        k_ref,
        v_ref,
        source,
        empty_carry(rows, width),
        split=split,
        at=(request, head) if ids_ref is None else None,
        pages=pages,
        page=page,
        width=width,
        scale=scale,
        config=config,
    )
    out, lse = normalized(carry)
    row, column = jnp.arange(rows), jnp.arange(out.shape[1])
    pltriton.store(
        out_ref.at[split, request, head, row[:, None], column[None, :]],
        out.astype(out_ref.dtype),
        mask=(row < group)[:, None] & (column < width)[None, :],
    )
    pltriton.store(lse_ref.at[split, request, head, row], lse, mask=row < group)


def merge_splits(
    outs: jax.Array, lses: jax.Array, *, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """`partials.merge` as one kernel: outs float32[splits, B, K, G, H], lses [splits, B, K, G]."""
    splits, batch, heads, group, width = outs.shape
    parts, padded = pl.next_power_of_2(splits), pl.next_power_of_2(width)

    def kernel(outs_ref, lses_ref, out_ref, lse_ref):
        row, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        part, column = jnp.arange(parts), jnp.arange(padded)
        lse = pltriton.load(
            lses_ref.at[part, request, head, row], mask=part < splits, other=-jnp.inf
        )
        peak = jnp.max(lse)
        safe = jnp.where(peak == -jnp.inf, 0.0, peak)
        weights = jnp.exp(lse - safe)
        total = jnp.sum(weights)
        inside = (part < splits)[:, None] & (column < width)[None, :]
        values = pltriton.load(
            outs_ref.at[part[:, None], request, head, row, column[None, :]], mask=inside, other=0.0
        )
        out = jnp.sum(values * weights[:, None], axis=0) / jnp.where(total == 0.0, 1.0, total)
        pltriton.store(
            out_ref.at[request, head, row, column], out.astype(out_ref.dtype), mask=column < width
        )
        lse_ref[request, head, row] = jnp.where(total == 0.0, -jnp.inf, safe + jnp.log(total))

    return platform.pallas_kernel(
        kernel,
        name="flexijax_merge_splits",
        grid=(group, heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, group, width), dtype),
            jax.ShapeDtypeStruct((batch, heads, group), jnp.float32),
        ],
        num_warps=4,
        num_stages=1,
    )(outs, lses)
