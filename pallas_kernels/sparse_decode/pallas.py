"""Flash decoding over chosen pages: through block ids (unstable heads) or in slots (stable heads).

One program attends one KV head of one request over a stretch of its pages, `block_tokens` tokens
at a time with a running softmax; the G query heads are the rows of the matrix products, padded to
the 16 rows of a tensor core. A head's pages are split over several programs, so that a batch of
one fills the GPU, and a second small kernel merges the parts by their log-sum-exp.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sparse_decode.tuning import MIN_ROWS, TuningConfig

_LOG2_E = math.log2(math.e)


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
            scale=scale * _LOG2_E,
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
    block, padded = config.block_tokens, pl.next_power_of_2(width)
    rows = max(MIN_ROWS, pl.next_power_of_2(group))

    row, column = jnp.arange(rows), jnp.arange(padded)
    in_width = (column < width)[None, :]
    in_group = (row < group)[:, None] & in_width
    q = pltriton.load(
        q_ref.at[request, head, row[:, None], column[None, :]], mask=in_group, other=0.0
    ).astype(k_ref.dtype)
    # Without this, float32 would be rounded to ten bits of mantissa on its way into tensor cores.
    precision = platform.float32_precision() if k_ref.dtype == jnp.float32 else None

    def step(i, carry):
        peak, total, out = carry
        token = (split * config.steps + i) * block + jnp.arange(block)
        index, place = token // page, token % page  # [block]
        listed = index < pages
        count = pltriton.load(counts_ref.at[request, head, index], mask=listed, other=0)
        valid = place < count
        # What is not valid may hold anything, and 0 * NaN is NaN. Values are read under a mask;
        # keys only decide logits of their own, which are dropped.
        if ids_ref is None:
            stored = (request * num_heads + head) * pages + index
            # One condition for the whole block: with one per token, loads along the tokens would
            # shrink from 128 bits to single numbers.
            needed = (jnp.max(count) > 0) & (token < pages * page)
            k = pltriton.load(
                k_ref.at[request, head, column[:, None], token[None, :]],
                mask=(column < width)[:, None] & needed[None, :],
                other=0.0,
            )
            logits = scale * _dot(q, k, (1, 0), precision)
        else:
            block_id = pltriton.load(ids_ref.at[request, head, index], mask=listed, other=0)
            stored = block_id * num_heads + head
            valid &= block_id >= 0
            k = pltriton.load(
                k_ref.at[(stored * page + place)[:, None], column[None, :]],
                mask=valid[:, None] & in_width,
                other=0.0,
            )
            logits = scale * _dot(q, k, (1, 1), precision)
        v = pltriton.load(
            v_ref.at[(stored * page + place)[:, None], column[None, :]],
            mask=valid[:, None] & in_width,
            other=0.0,
        )
        logits = jnp.where(valid[None, :], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        shrink = jnp.exp2(peak - safe)
        weights = jnp.exp2(logits - safe[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, (1, 0), precision)
        return new_peak, total, out

    carry = (
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, padded), jnp.float32),
    )
    peak, total, out = lax.fori_loop(0, config.steps, step, carry)
    out = out / jnp.where(total == 0.0, 1.0, total)[:, None]
    lse = jnp.where(total == 0.0, -jnp.inf, (peak + jnp.log2(total)) / _LOG2_E)
    pltriton.store(
        out_ref.at[split, request, head, row[:, None], column[None, :]],
        out.astype(out_ref.dtype),
        mask=in_group,
    )
    pltriton.store(lse_ref.at[split, request, head, row], lse, mask=row < group)


def _dot(a, b, contract, precision):
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


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
