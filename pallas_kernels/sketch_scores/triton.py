"""The kernel of `pallas.py` in Triton itself, for implementation="triton"."""

# Triton's own types know neither unrolled loops nor blocks of three axes.
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from flexijax.pallas_kernels import lanes, platform
from flexijax.pallas_kernels.sketch_scores.tuning import TuningConfig
from flexijax.pallas_kernels.sketches import WORD, SketchQuery, words


@triton.jit
def dot4(codes, weights, total, ASM: tl.constexpr):
    """total + the sum of four products of unsigned bytes with signed ones; blocks of one shape."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [codes, weights, total],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:  # the interpreter knows no assembly
        for at in tl.static_range(0, 32, 8):
            total += ((codes >> at) & 255) * ((weights << (24 - at)) >> 24)
    return total


@triton.jit
def flexijax_sketches(
    weights_ptr,  # int32[B, K, G, WORDS, 8]
    offset_ptr,  # float32[B, K, G]
    unit_ptr,  # float32[B, K, G]
    codes_ptr,  # uint32[blocks, K, BITS, WORDS, PAGE]
    table_ptr,  # int32[B, P]
    lengths_ptr,  # int32[B]
    out_ptr,  # float32[B, K, G, P]
    PAGES: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    PLACES: tl.constexpr,
    SCALE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ASM: tl.constexpr,
):
    tile, head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    length = tl.load(lengths_ptr + request)
    page = tile * TILE + tl.arange(0, TILE)
    full = (page < PAGES) & ((page + 1) * PAGE <= length)
    ids = tl.load(table_ptr + request * PAGES + page, mask=full, other=0)
    block = (ids.to(tl.int64) * heads + head) * (BITS * WORDS * PAGE)
    code_at = block[:, None] + tl.arange(0, PAGE)[None, :]
    head_of_group = tl.arange(0, COLUMNS)
    in_group = head_of_group < GROUP
    query = (request * heads + head) * GROUP + head_of_group
    product = tl.zeros([COLUMNS, TILE, PAGE], tl.int32)
    for backwards in tl.static_range(PLACES):
        for word in tl.static_range(WORDS):
            for half in tl.static_range(2):
                code = tl.zeros([TILE, PAGE], tl.int32)
                for bit in tl.static_range(BITS):
                    at = codes_ptr + code_at + (bit * WORDS + word) * PAGE
                    plane = tl.load(at, mask=full[:, None], other=0).to(tl.int32, bitcast=True)
                    if bit > half * PLACES:
                        plane = plane << (bit - half * PLACES)
                    else:
                        plane = plane >> (half * PLACES - bit)
                    code |= plane & (0x01010101 << (PLACES - 1 - backwards + bit))
                which = (query * WORDS + word) * (2 * PLACES) + half * PLACES
                weight = tl.load(
                    weights_ptr + which + (PLACES - 1 - backwards), mask=in_group, other=0
                )
                product = dot4(
                    tl.broadcast_to(code[None, :, :], product.shape),
                    tl.broadcast_to(weight[:, None, None], product.shape),
                    product,
                    ASM,
                )
        if backwards == 0:
            product = product >> 1
    scored = head_of_group < tl.where(length >= PAGE, GROUP, 0)
    unit = tl.load(unit_ptr + query, mask=scored, other=0.0) / SCALE
    offset = tl.load(offset_ptr + query, mask=scored, other=0.0)
    logits = product.to(tl.float32) * unit[:, None, None] + offset[:, None, None]
    highest = tl.max(logits, 2)
    total = tl.sum(tl.exp(logits - highest[:, :, None]), 2)
    score = tl.where(full[None, :], tl.log(total) + highest, float("-inf"))
    tl.store(
        out_ptr + query[:, None] * PAGES + page[None, :],
        score,
        mask=in_group[:, None] & (page < PAGES)[None, :],
    )


def options(
    *, batch: int, heads: int, group: int, width: int, pages: int, page: int, bits: int
) -> dict[str, int]:
    """The compile-time arguments of a launch; the grid is (tiles, K, B)."""
    config = TuningConfig.choose(pages=pages, page_size=page, group=group, heads=batch * heads)
    return {
        "PAGES": pages,
        "GROUP": group,
        "PAGE": page,
        "TILE": config.tile_pages,
        "BITS": bits,
        "WORDS": words(width),
        "PLACES": lanes.PLACES,
        "SCALE": lanes.SCALE,
        "COLUMNS": triton.next_power_of_2(group),
        "ASM": True,
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
    batch, heads, group = query.unit.shape
    pages = block_table.shape[1]
    bits = codes.shape[2]
    constants = options(
        batch=batch,
        heads=heads,
        group=group,
        width=codes.shape[3] * WORD,
        pages=pages,
        page=page_size,
        bits=bits,
    )
    [scores] = platform.triton_call(
        lanes.packed(query.weights),
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
