"""Page scores from key sketches through the block table: codes are unpacked in registers.

One program scores the pages of one tile of one KV head: the tokens are the rows of a matrix product
on tensor cores, the G query heads its columns. Weights and codes are small whole numbers, so
float16 holds them, and float32 their sums, exactly.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sketch_scores.tuning import TuningConfig
from flexijax.pallas_kernels.sketches import WORD, SketchQuery


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
    bits, words = codes.shape[2:4]
    config = TuningConfig.choose(pages=pages, page_size=page_size, group=group)
    tile, columns = config.tile_pages, config.columns

    def kernel(weights_ref, offset_ref, unit_ref, codes_ref, table_ref, lengths_ref, out_ref):
        # weights [B, K, G, H], offset and unit [B, K, G], codes [blocks, K, bits, W, page],
        # table [B, P], lengths [B], out [B, K, G, P]
        head, request = pl.program_id(1), pl.program_id(2)
        page = pl.program_id(0) * tile + jnp.arange(tile)
        # Pages that are not full are not read: neither their id nor their codes.
        full = ((page + 1) * page_size <= lengths_ref[request]) & (page < pages)
        ids = pltriton.load(table_ref.at[request, page], mask=full, other=0)
        column = jnp.arange(columns)
        in_group = column < group
        token = jnp.arange(page_size)
        product = jnp.zeros((tile * page_size, columns), jnp.float32)
        for word in range(words):
            channel = word * WORD + jnp.arange(WORD)
            weights = pltriton.load(
                weights_ref.at[request, head, column[:, None], channel[None, :]],
                mask=in_group[:, None] & (channel < width)[None, :],
                other=0,
            )
            code = jnp.zeros((tile, page_size, WORD), jnp.int32)
            for bit in range(bits):
                packed = pltriton.load(
                    codes_ref.at[ids[:, None], head, bit, word, token[None, :]],
                    mask=full[:, None],
                    other=0,
                )
                packed = lax.bitcast_convert_type(packed, jnp.int32)[:, :, None]
                place = jnp.arange(WORD, dtype=jnp.int32)[None, None, :]
                code += ((packed >> place) & 1) << bit
            product += lax.dot_general(
                code.astype(jnp.float16).reshape(tile * page_size, WORD),
                weights.astype(jnp.float16),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
        at = (request, head, column)
        offset = pltriton.load(offset_ref.at[at], mask=in_group, other=0.0)
        unit = pltriton.load(unit_ref.at[at], mask=in_group, other=0.0)
        logits = (product * unit[None, :] + offset[None, :]).reshape(tile, page_size, columns)
        highest = jnp.max(logits, axis=1)
        total = jnp.sum(jnp.exp(logits - highest[:, None, :]), axis=1)
        score = jnp.where(full[:, None], jnp.log(total) + highest, -jnp.inf)
        pltriton.store(
            out_ref.at[request, head, column[None, :], page[:, None]],
            score,
            mask=in_group[None, :] & (page < pages)[:, None],
        )

    return platform.pallas_kernel(
        kernel,
        name="flexijax_sketch_scores",
        grid=(pl.cdiv(pages, tile), heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, heads, group, pages), jnp.float32),
        num_warps=4,
        num_stages=1,
    )(query.weights, query.offset, query.unit, codes, block_table, lengths)
