"""Prepared queries as one kernel, where XLA makes ten of a product and its reductions.

One program prepares the G query heads of one KV head: their product with Hadamard's matrix on
tensor cores, their rounding, and the packing of four weights to a register.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import lanes, platform
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.sketches import (
    LARGEST,
    TINY,
    WORD,
    SketchCode,
    SketchQuery,
    signs,
    words,
)

# Of a tensor core: the query heads are padded to so many rows.
_MIN_ROWS = 16


def sketch_query(
    q: jax.Array | HeadQueries, code: SketchCode, *, bits: int, scale: float
) -> SketchQuery:
    """Weights int32[B, K, G, W, 8] as `lanes.pack` makes them; see `dispatch.sketch_query`."""
    batch, heads, group, width = q.shape
    if not isinstance(q, HeadQueries):
        q = HeadQueries(q.reshape(batch, heads * group, width), tuple(range(heads)), group)
    dtype, first = q.rows.dtype, q.heads[0]
    named = []
    if q.heads != tuple(range(first, first + heads)):
        # One added: of what could be counted from 0 in steps the compiler would make a launch.
        named = [jnp.array([head + 1 for head in q.heads], jnp.int32)]
    count = words(width)
    rows, padded = max(_MIN_ROWS, pl.next_power_of_2(group)), pl.next_power_of_2(count) * WORD
    shrink = scale * float(width & -width) ** -0.5
    precision = platform.float32_precision() if dtype == jnp.float32 else None

    def kernel(rows_ref, signs_ref, mean_ref, step_ref, *refs):
        # rows [B, M, H], signs [H, H], mean and step [B, K, H], named int32[K] where there is one;
        # weights int32[B, K, G, W, 8]
        *named_ref, weights_ref, offset_ref, unit_ref = refs
        head, request = pl.program_id(0), pl.program_id(1)
        lies_at = (named_ref[0][head] - 1 if named_ref else first + head) * group
        row, column = jnp.arange(rows), jnp.arange(padded)
        inside = column < width
        query = pltriton.load(
            rows_ref.at[request, (lies_at + row)[:, None], column[None, :]],
            mask=(row < group)[:, None] & inside[None, :],
            other=0.0,
        )
        matrix = pltriton.load(
            signs_ref.at[column[:, None], column[None, :]],
            mask=inside[:, None] & inside[None, :],
            other=0.0,
        )
        rotated = shrink * lax.dot_general(
            query,
            matrix,
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        mean = pltriton.load(mean_ref.at[request, head, column], mask=inside, other=0.0)
        step = pltriton.load(step_ref.at[request, head, column], mask=inside, other=0.0)
        exact = rotated * step[None, :]
        unit = jnp.maximum(jnp.max(jnp.abs(exact), axis=1), TINY) / LARGEST
        whole = jnp.floor(exact / unit[:, None] + 0.5)
        middle = unit * jnp.sum(whole, axis=1) * ((2**bits - 1) / 2)
        offset = jnp.sum(rotated * mean[None, :], axis=1) - middle
        # Channel 32 w + s + 8 j is byte j of the word at (w, s); see `lanes`.
        place = column % lanes.GROUPS % lanes.PLACES
        factor = jnp.where(place == 0, 4, jnp.where(place == 1, 2, 1))
        byte = (whole.astype(jnp.int32) * factor[None, :]) & 255
        byte <<= (8 * (column % WORD // lanes.GROUPS))[None, :]
        packed = byte.reshape(rows, padded // WORD, lanes.LANES, lanes.GROUPS).sum(axis=2)
        packed = packed.reshape(rows, padded // lanes.LANES)
        at = jnp.arange(padded // lanes.LANES)
        pltriton.store(
            weights_ref.at[request, head, row[:, None], at[None, :]],
            packed,
            mask=(row < group)[:, None] & (at < count * lanes.GROUPS)[None, :],
        )
        pltriton.store(offset_ref.at[request, head, row], offset, mask=row < group)
        pltriton.store(unit_ref.at[request, head, row], unit, mask=row < group)

    lead = (batch, heads, group)
    weights, offset, unit = platform.pallas_kernel(
        kernel,
        name="flexijax_sketch_query",
        grid=(heads, batch),
        out_shape=[
            jax.ShapeDtypeStruct((*lead, count * lanes.GROUPS), jnp.int32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
            jax.ShapeDtypeStruct(lead, jnp.float32),
        ],
        num_warps=4,
    )(
        q.rows,
        jnp.asarray(signs(width), dtype),
        code.mean,
        code.step,
        *named,
    )
    return SketchQuery(weights.reshape(*lead, count, lanes.GROUPS), offset, unit)
