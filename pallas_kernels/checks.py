"""What each public operation demands of its arguments; every failure is a ValueError."""

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.sketches import SPACING, SketchQuery, words
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


def check_sketch_scores(
    query: SketchQuery,
    codes: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    page_size: int,
) -> None:
    """The arguments of `dispatch.sketch_scores`."""
    sizes = axis_sizes(
        weights=(query.weights, "B K G H"),
        offset=(query.offset, "B K G"),
        unit=(query.unit, "B K G"),
        codes=(codes, f"blocks K bits {words(query.weights.shape[-1])} {page_size}"),
        block_table=(block_table, "B P"),
        lengths=(lengths, "B"),
    )
    check_bits(codes, sizes["bits"])
    check_dtype("weights", query.weights, jnp.int8)
    check_dtype("offset", query.offset, jnp.float32)
    check_dtype("unit", query.unit, jnp.float32)
    check_dtype("codes", codes, jnp.uint32)
    check_dtype("block_table", block_table, jnp.int32)
    check_dtype("lengths", lengths, jnp.int32)
    check_page_size(page_size)


def check_paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_ids: jax.Array,
    token_counts: jax.Array,
    scale: float,
) -> None:
    """The arguments of `dispatch.paged_decode`."""
    axis_sizes(
        q=(q, "B K G H"),
        k_pages=(k_pages, "blocks K page H"),
        v_pages=(v_pages, "blocks K page H"),
        block_ids=(block_ids, "B K n"),
        token_counts=(token_counts, "B K n"),
    )
    _check_attention(q, k_pages, v_pages, scale)
    check_page_size(k_pages.shape[2])
    check_dtype("block_ids", block_ids, jnp.int32)
    check_dtype("token_counts", token_counts, jnp.int32)


def check_slot_decode(
    q: jax.Array, k_slots: jax.Array, v_slots: jax.Array, token_counts: jax.Array, scale: float
) -> None:
    """The arguments of `dispatch.slot_decode`."""
    axis_sizes(
        q=(q, "B K G H"),
        k_slots=(k_slots, "B K H S page"),
        v_slots=(v_slots, "B K S page H"),
        token_counts=(token_counts, "B K S"),
    )
    _check_attention(q, k_slots, v_slots, scale)
    check_page_size(k_slots.shape[4])
    check_dtype("token_counts", token_counts, jnp.int32)


def check_prefill_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
    """The arguments of `dispatch.prefill_attention`."""
    axis_sizes(q=(q, "T K G H"), k=(k, "K H S"), v=(v, "K S H"))
    _check_attention(q, k, v, scale)


def check_promote(
    slots_k: jax.Array, slots_v: jax.Array, host_k: jax.Array, host_v: jax.Array, load: jax.Array
) -> None:
    """The arguments of `dispatch.promote`."""
    check_tiers(slots_k, slots_v, host_k, host_v)
    axis_sizes(slots_v=(slots_v, "B K S page H"), load=(load, "B K S"))
    check_dtype("load", load, jnp.int32)


def check_offload(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    store_block: jax.Array,
    store_slot: jax.Array,
) -> None:
    """The arguments of `dispatch.offload`."""
    check_tiers(slots_k, slots_v, host_k, host_v)
    axis_sizes(
        slots_v=(slots_v, "B K S page H"),
        store_block=(store_block, "B E"),
        store_slot=(store_slot, "B K E"),
    )
    check_dtype("store_block", store_block, jnp.int32)
    check_dtype("store_slot", store_slot, jnp.int32)


def axis_sizes(**arrays: tuple[jax.Array, str]) -> dict[str, int]:
    """The size of every named axis; raises where an array contradicts itself or an earlier one."""
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        names = axes.split()
        described = f"{name}[{', '.join(names)}]"
        if len(array.shape) != len(names):
            raise ValueError(f"{described} has {len(names)} axes, got shape {array.shape}")
        for axis, size in zip(names, array.shape, strict=True):
            expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
            if size != expected:
                other = f" as in {origin[axis]}" if axis in origin else ""
                raise ValueError(
                    f"{described} has shape {array.shape}, but {axis} is {expected}{other}"
                )
            if size == 0:
                raise ValueError(f"{described} has shape {array.shape}: {axis} must not be 0")
            origin.setdefault(axis, f"{described} of shape {array.shape}")
    return sizes


def _check_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> None:
    for name, array in (("q", q), ("keys", k), ("values", v)):
        check_float(name, array)
    if k.dtype != v.dtype:
        raise ValueError(f"keys and values must have one dtype, got {k.dtype} and {v.dtype}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def check_bits(codes: jax.Array, bits: int) -> None:
    """Of the shape of codes: what `sketches` knows."""
    if bits not in SPACING:
        raise ValueError(
            f"codes has shape {codes.shape}: bits must be one of {tuple(SPACING)}, got {bits}"
        )


def check_tiers(
    slots_k: jax.Array, slots_v: jax.Array, host_k: jax.Array, host_v: jax.Array
) -> None:
    """Slots and host pages as `dispatch.promote` has them."""
    axis_sizes(
        slots_k=(slots_k, "B K H S page"),
        slots_v=(slots_v, "B K S page H"),
        host_k=(host_k, "blocks K page H"),
        host_v=(host_v, "blocks K page H"),
    )
    dtypes = {str(x.dtype) for x in (slots_k, slots_v, host_k, host_v)}
    if len(dtypes) > 1:
        raise ValueError(f"slots and host pages must have one dtype, got {sorted(dtypes)}")


def check_float(name: str, array: jax.Array) -> None:
    """One of the dtypes of keys and values."""
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {array.dtype}")


def check_dtype(name: str, array: jax.Array, dtype: type) -> None:
    """Exactly that dtype."""
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {jnp.dtype(dtype).name}, got {array.dtype}")


def check_page_size(page_size: int) -> None:
    """A power of two."""
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page size must be a power of two, got {page_size}")
