"""The kernel of `pallas.py` in Triton itself, for implementation="triton"."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.sketch_scores.tuning import TuningConfig
from flexijax.pallas_kernels.sketches import WORD, SketchQuery, words


@triton.jit
def flexijax_sketches(
    weights_ptr,  # int8[B, K, G, H]
    offset_ptr,  # float32[B, K, G]
    unit_ptr,  # float32[B, K, G]
    codes_ptr,  # uint32[blocks, K, BITS, WORDS, PAGE]
    table_ptr,  # int32[B, P]
    lengths_ptr,  # int32[B]
    out_ptr,  # float32[B, K, G, P]
    PAGES: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    WORD: tl.constexpr,
):
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    length = tl.load(lengths_ptr + request)
    page = tile * TILE + tl.arange(0, TILE)
    full = (page < PAGES) & ((page + 1) * PAGE <= length)
    # One row a token: the words of a page's tokens lie side by side.
    row = tl.arange(0, TILE * PAGE)
    row_page = tile * TILE + row // PAGE
    row_full = (row_page < PAGES) & ((row_page + 1) * PAGE <= length)
    block_id = tl.load(table_ptr + request * PAGES + row_page, mask=row_full, other=0)
    code_at = (block_id.to(tl.int64) * heads + head) * (BITS * WORDS * PAGE) + row % PAGE
    column = tl.arange(0, COLUMNS)
    in_group = column < GROUP
    query = (request * heads + head) * GROUP + column
    place = tl.arange(0, WORD)
    product = tl.zeros([TILE * PAGE, COLUMNS], tl.float32)
    for word in range(WORDS):
        channel = word * WORD + place
        weights = tl.load(
            weights_ptr + query[None, :] * WIDTH + channel[:, None],
            mask=in_group[None, :] & (channel < WIDTH)[:, None],
            other=0,
        )
        code = tl.zeros([TILE * PAGE, WORD], tl.int32)
        for bit in range(BITS):
            at = codes_ptr + code_at + (bit * WORDS + word) * PAGE
            packed = tl.load(at, mask=row_full, other=0).to(tl.int32, bitcast=True)
            code += ((packed[:, None] >> place[None, :]) & 1) << bit
        product += tl.dot(code.to(tl.float16), weights.to(tl.float16))
    scored = column < tl.where(length >= PAGE, GROUP, 0)
    offset = tl.load(offset_ptr + query, mask=scored, other=0.0)
    unit = tl.load(unit_ptr + query, mask=scored, other=0.0)
    logits = tl.reshape(product * unit[None, :] + offset[None, :], [TILE, PAGE, COLUMNS])
    highest = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - tl.expand_dims(highest, 1)), 1)
    score = tl.where(full[:, None], tl.log(total) + highest, float("-inf"))
    tl.store(
        out_ptr + query[None, :] * PAGES + page[:, None],
        score,
        mask=in_group[None, :] & (page < PAGES)[:, None],
    )


def options(*, group: int, width: int, pages: int, page: int, bits: int) -> dict[str, int]:
    """The compile-time arguments of a launch; the grid is (tiles, K, B)."""
    config = TuningConfig.choose(pages=pages, page_size=page, group=group)
    return {
        "PAGES": pages,
        "GROUP": group,
        "WIDTH": width,
        "PAGE": page,
        "TILE": config.tile_pages,
        "COLUMNS": config.columns,
        "BITS": bits,
        "WORDS": words(width),
        "WORD": WORD,
    }


def sketch_scores(
    query: SketchQuery,
    codes: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
) -> jax.Array:
    """float32[B, K, G, P], -inf where a page is not full; see `dispatch.sketch_scores`."""
    batch, heads, group, width = query.weights.shape
    pages = block_table.shape[1]
    constants = options(group=group, width=width, pages=pages, page=page_size, bits=codes.shape[2])
    [scores] = platform.triton_call(
        query.weights,
        query.offset,
        query.unit,
        codes,
        block_table,
        lengths,
        kernel=flexijax_sketches,
        out_shape=[jax.ShapeDtypeStruct((batch, heads, group, pages), jnp.float32)],
        grid=(-(-pages // constants["TILE"]), heads, batch),
        num_warps=4,
        num_stages=1,
        constants=constants,
    )
    return scores
