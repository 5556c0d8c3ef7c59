"""The kernel of `pallas.py` in Triton itself, for implementation="triton"."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.page_scores.tuning import TuningConfig
from flexijax.pallas_kernels.summaries import QuantizedSummaries, Summaries


@triton.jit
def flexijax_scores(
    q_ptr,  # [B, K, G, H]
    table_ptr,  # int32[B, P]
    lengths_ptr,  # int32[B]
    values_ptr,  # [blocks, K, 2, H]
    exponents_ptr,  # uint8[blocks, K, 2, H // PART]; not read unless QUANTIZED
    out_ptr,  # float32[B, K, P]
    PAGES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    page = tile * BLOCK + tl.arange(0, BLOCK)
    exists = (page < PAGES) & (page * PAGE < tl.load(lengths_ptr + request))
    block_id = tl.load(table_ptr + request * PAGES + page, mask=exists, other=0)
    side_row = (block_id.to(tl.int64) * heads + head) * 2
    column = tl.arange(0, COLUMNS)
    in_group = column < GROUP
    query_row = ((request * heads + head) * GROUP + column) * WIDTH
    bound = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for index in range(PARTS):
        place = index * PART + tl.arange(0, PART)
        in_width = place < WIDTH
        q_mask = in_width[:, None] & in_group[None, :]
        q = tl.load(q_ptr + query_row[None, :] + place[:, None], mask=q_mask, other=0.0)
        zero = tl.zeros_like(q)
        mask = exists[:, None] & in_width[None, :]
        low_at = side_row[:, None] * WIDTH + place[None, :]
        low = tl.load(values_ptr + low_at, mask=mask, other=0).to(q.dtype)
        high = tl.load(values_ptr + low_at + WIDTH, mask=mask, other=0).to(q.dtype)
        low = tl.dot(low, tl.minimum(q, zero), input_precision=PRECISION)
        high = tl.dot(high, tl.maximum(q, zero), input_precision=PRECISION)
        if QUANTIZED:
            scale_at = exponents_ptr + side_row * PARTS + index
            biased_low = tl.load(scale_at, mask=exists, other=0).to(tl.int32)
            biased_high = tl.load(scale_at + PARTS, mask=exists, other=0).to(tl.int32)
            low = low * (biased_low << 23).to(tl.float32, bitcast=True)[:, None]
            high = high * (biased_high << 23).to(tl.float32, bitcast=True)[:, None]
        bound += low + high
    bound = tl.where(in_group[None, :], bound, float("-inf"))
    score = tl.where(exists, tl.max(bound, 1), float("-inf"))
    tl.store(out_ptr + (request * heads + head) * PAGES + page, score, mask=page < PAGES)


def options(
    *, group: int, width: int, pages: int, page: int, quantized: bool
) -> dict[str, int | bool]:
    """The compile-time arguments of a launch except PRECISION; the grid is (tiles, K, B)."""
    config = TuningConfig.choose(pages=pages, group=group, width=width, quantized=quantized)
    return {
        "PAGES": pages,
        "GROUP": group,
        "WIDTH": width,
        "PAGE": page,
        "BLOCK": config.tile_pages,
        "COLUMNS": config.columns,
        "PART": config.part,
        "PARTS": config.parts,
        "QUANTIZED": quantized,
    }


def page_scores(
    q: jax.Array,
    summaries: Summaries,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
) -> jax.Array:
    """float32[B, K, P] bounds, -inf beyond each request's pages; see `dispatch.page_scores`."""
    batch, heads, group, width = q.shape
    pages = block_table.shape[1]
    quantized = isinstance(summaries, QuantizedSummaries)
    values = summaries.values if quantized else summaries
    exponents = summaries.exponents if quantized else lengths
    constants = options(group=group, width=width, pages=pages, page=page_size, quantized=quantized)
    [scores] = platform.triton_call(
        q if quantized else q.astype(values.dtype),
        block_table,
        lengths,
        values,
        exponents,
        kernel=flexijax_scores,
        out_shape=[jax.ShapeDtypeStruct((batch, heads, pages), jnp.float32)],
        grid=(-(-pages // constants["BLOCK"]), heads, batch),
        num_warps=4,
        num_stages=1,
        constants={
            **constants,
            "PRECISION": "tf32x3" if q.dtype == jnp.float32 else "ieee",
        },
    )
    return scores
