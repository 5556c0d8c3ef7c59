"""Upper bounds of q.k over pages from the min and max of their keys, through the block table.

max(q*max, q*min) = relu(q)*max + min(q, 0)*min, so the bound is a matrix product: pages are its
rows, the G query heads its columns. One program scores a tile of pages of one KV head.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.page_scores.tuning import TuningConfig
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.summaries import QuantizedSummaries, Summaries


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
    config = TuningConfig.choose(pages=pages, group=group, width=width, quantized=quantized)
    tile_pages, part = config.tile_pages, config.part

    def kernel(q_ref, table_ref, lengths_ref, values_ref, *refs):
        exponents_ref, out_ref = refs if quantized else (None, *refs)
        tile, head, request = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        page = tile * tile_pages + jnp.arange(tile_pages)
        # Pages the request does not have are not read: neither their id nor their summary.
        exists = page * page_size < lengths_ref[request]
        exists &= page < pages
        ids = pltriton.load(table_ref.at[request, page], mask=exists, other=0)
        column = jnp.arange(config.columns)
        in_group = (column < group)[:, None]
        bound = jnp.zeros((tile_pages, config.columns), jnp.float32)
        for index in range(config.parts):
            place = index * part + jnp.arange(part)
            in_width = (place < width)[None, :]
            query = pltriton.load(
                q_ref.at[request, head, column[:, None], place[None, :]],
                mask=in_group & in_width,
                other=0.0,
            )
            for side, chosen in ((0, jnp.minimum(query, 0)), (1, jnp.maximum(query, 0))):
                values = pltriton.load(
                    values_ref.at[ids[:, None], head, side, place[None, :]],
                    mask=exists[:, None] & in_width,
                    other=0,
                )
                dtype = q_ref.dtype if quantized else values_ref.dtype
                product = lax.dot_general(
                    values.astype(dtype),
                    chosen.astype(dtype),
                    (((1,), (1,)), ((), ())),
                    precision=platform.float32_precision() if dtype == jnp.float32 else None,
                    preferred_element_type=jnp.float32,
                )
                if exponents_ref is not None:
                    exponent = pltriton.load(
                        exponents_ref.at[ids, head, side, index], mask=exists, other=0
                    )
                    bits = exponent.astype(jnp.int32) << 23
                    product *= lax.bitcast_convert_type(bits, jnp.float32)[:, None]
                bound += product
        bound = jnp.where((column < group)[None, :], bound, -jnp.inf)
        score = jnp.where(exists, jnp.max(bound, axis=1), -jnp.inf)
        pltriton.store(out_ref.at[request, head, page], score, mask=page < pages)

    leaves = jax.tree.leaves(summaries)
    return platform.pallas_kernel(
        kernel,
        name="flexijax_page_scores",
        grid=(pl.cdiv(pages, tile_pages), heads, batch),
        out_shape=jax.ShapeDtypeStruct((batch, heads, pages), jnp.float32),
        num_warps=4,
        num_stages=1,
    )(q, block_table, lengths, *leaves)
