"""Page scores from key sketches through the block table: codes are unpacked in registers.

One program scores the pages of one tile of one KV head, a few tokens a thread. A page's codes are
so few bytes that instructions decide the speed: four codes are masked out of a word at once and
multiplied with four weights by one `dp4a`, without a way through shared memory as a product on
tensor cores would take, and for the G query heads that there are rather than a padded 16.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import lanes, platform
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sketch_scores.tuning import TuningConfig
from flexijax.pallas_kernels.sketches import SketchQuery

_LOG2_E = math.log2(math.e)


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
    bits, words = codes.shape[2:4]
    config = TuningConfig.choose(pages=pages, page_size=page_size, group=group, heads=batch * heads)
    tile = config.tile_pages

    def kernel(weights_ref, offset_ref, unit_ref, codes_ref, table_ref, lengths_ref, out_ref):
        # weights int32[B, K, G, W, 8], offset and unit [B, K, G], codes [blocks, K, bits, W, page],
        # table [B, P], lengths [B], out [B, K, G, P]
        head, request = pl.program_id(1), pl.program_id(2)
        page = pl.program_id(0) * tile + jnp.arange(tile)
        # Pages that are not full are not read: neither their id nor their codes.
        full = ((page + 1) * page_size <= lengths_ref[request]) & (page < pages)
        ids = pltriton.load(table_ref.at[request, page], mask=full, other=0)
        token = jnp.arange(page_size)

        def load(bit: int, word: int) -> jax.Array:
            packed = pltriton.load(
                codes_ref.at[ids[:, None], head, bit, word, token[None, :]],
                mask=full[:, None],
                other=0,
            )
            return lax.bitcast_convert_type(packed, jnp.int32)

        planes = [[load(bit, word) for bit in range(bits)] for word in range(words)]
        products = [jnp.zeros((tile, page_size), jnp.int32) for _ in range(group)]
        for place in reversed(range(lanes.PLACES)):
            for word in range(words):
                for half in range(2):
                    code = jnp.zeros((tile, page_size), jnp.int32)
                    for bit, plane in enumerate(planes[word]):
                        shift = bit - half * lanes.PLACES
                        moved = plane << shift if shift > 0 else plane >> -shift
                        code |= moved & (lanes.ONES << (place + bit))
                    at = half * lanes.PLACES + place
                    for g in range(group):
                        weight = weights_ref[request, head, g, word, at]
                        products[g] = platform.dot4(code, weight, products[g])
            if place == lanes.PLACES - 1:
                products = [product >> 1 for product in products]
        for g, product in enumerate(products):
            unit = unit_ref[request, head, g] * (_LOG2_E / lanes.SCALE)
            offset = offset_ref[request, head, g] * _LOG2_E
            logits = product.astype(jnp.float32) * unit + offset  # of base 2
            highest = jnp.max(logits, axis=1)
            total = jnp.sum(jnp.exp2(logits - highest[:, None]), axis=1)
            score = jnp.where(full, (jnp.log2(total) + highest) / _LOG2_E, -jnp.inf)
            pltriton.store(out_ref.at[request, head, g, page], score, mask=page < pages)

    return platform.pallas_kernel(
        kernel,
        name="flexijax_sketch_scores",
        grid=(pl.cdiv(pages, tile), heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, heads, group, pages), jnp.float32),
        num_warps=config.num_warps,
        num_stages=1,
    )(lanes.packed(query.weights), query.offset, query.unit, codes, block_table, lengths)
