"""What the operations that choose pages demand of their arguments; see `checks`."""

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.checks import (
    axis_sizes,
    check_dtype,
    check_float,
    check_page_size,
    check_scale,
)
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.pallas_kernels.sketches import SPACING, SketchCode, SketchQuery, words
from flexijax.pallas_kernels.summaries import QuantizedSummaries, Summaries, group_size


def check_page_scores(
    q: jax.Array, summaries: Summaries, block_table: jax.Array, lengths: jax.Array, page_size: int
) -> None:
    """The arguments of `dispatch.page_scores`."""
    quantized = isinstance(summaries, QuantizedSummaries)
    values = summaries.values if quantized else summaries
    sizes = axis_sizes(
        q=(q, "B K G H"),
        summaries=(values, "blocks K 2 H"),
        block_table=(block_table, "B P"),
        lengths=(lengths, "B"),
    )
    if quantized:
        groups = sizes["H"] // group_size(sizes["H"])
        if summaries.exponents.shape != (*values.shape[:3], groups):
            raise ValueError(
                f"summaries.exponents has shape {summaries.exponents.shape}, expected "
                f"{(*values.shape[:3], groups)} beside summaries.values of shape {values.shape}"
            )
        check_dtype("summaries.values", values, jnp.int8)
        check_dtype("summaries.exponents", summaries.exponents, jnp.uint8)
    else:
        check_float("summaries", values)
    check_float("q", q)
    check_dtype("block_table", block_table, jnp.int32)
    check_dtype("lengths", lengths, jnp.int32)
    check_page_size(page_size)


def check_sketch_query(
    q: jax.Array | HeadQueries, code: SketchCode, bits: int, scale: float
) -> None:
    """The arguments of `dispatch.sketch_query`."""
    if isinstance(q, HeadQueries):
        heads = len(q.heads)
        axes = {"rows": (q.rows, "B M H"), "mean": (code.mean, f"B {heads} H")}
        sizes = axis_sizes(**axes, step=(code.step, f"B {heads} H"))
        if not heads or min(q.heads) < 0 or (max(q.heads) + 1) * q.group > sizes["M"]:
            raise ValueError(
                f"heads {q.heads} of {q.group} query heads each do not lie in {sizes['M']} rows"
            )
        check_float("rows", q.rows)
    else:
        axis_sizes(q=(q, "B K G H"), mean=(code.mean, "B K H"), step=(code.step, "B K H"))
        check_float("q", q)
    check_dtype("mean", code.mean, jnp.float32)
    check_dtype("step", code.step, jnp.float32)
    if bits not in SPACING:
        raise ValueError(f"bits must be one of {tuple(SPACING)}, got {bits}")
    check_scale(scale)


def check_sketch_scores(
    query: SketchQuery,
    codes: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    page_size: int,
) -> None:
    """The arguments of `dispatch.sketch_scores`."""
    packed = query.weights.dtype == jnp.int32
    width = "W" if packed else str(words(query.weights.shape[-1]))
    sizes = axis_sizes(
        weights=(query.weights, "B K G W 8" if packed else "B K G H"),
        offset=(query.offset, "B K G"),
        unit=(query.unit, "B K G"),
        codes=(codes, f"blocks K bits {width} {page_size}"),
        block_table=(block_table, "B P"),
        lengths=(lengths, "B"),
    )
    check_bits(codes, sizes["bits"])
    if not packed:
        check_dtype("weights", query.weights, jnp.int8)
    check_dtype("offset", query.offset, jnp.float32)
    check_dtype("unit", query.unit, jnp.float32)
    check_dtype("codes", codes, jnp.uint32)
    check_dtype("block_table", block_table, jnp.int32)
    check_dtype("lengths", lengths, jnp.int32)
    check_page_size(page_size)


def check_select_pages(
    scores: jax.Array,
    lengths: jax.Array,
    scored: jax.Array,
    count: int,
    newer: int,
    sinks: int,
    page_size: int,
) -> None:
    """The arguments of `dispatch.select_pages`."""
    axis_sizes(scores=(scores, "B K G P"), lengths=(lengths, "B"), scored=(scored, "B"))
    check_dtype("scores", scores, jnp.float32)
    check_dtype("lengths", lengths, jnp.int32)
    check_dtype("scored", scored, jnp.int32)
    check_page_size(page_size)
    for name, value, least in (("count", count, 1), ("newer", newer, 0), ("sinks", sinks, 0)):
        if value < least:
            raise ValueError(f"{name}={value} of select_pages must be at least {least}")


def check_bits(codes: jax.Array, bits: int) -> None:
    """Of the shape of codes: what `sketches` knows."""
    if bits not in SPACING:
        raise ValueError(
            f"codes has shape {codes.shape}: bits must be one of {tuple(SPACING)}, got {bits}"
        )
