"""What the operations of `dispatch_rerank.py` demand of their arguments, as `checks.py`."""

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.checks import (
    axis_sizes,
    check_dtype,
    check_float,
    check_page_size,
    check_tiers,
)
from flexijax.pallas_kernels.checks_scores import check_bits
from flexijax.pallas_kernels.rerank import RerankStats
from flexijax.pallas_kernels.sketches import SketchCode, words


def check_paged_encode(
    codes: jax.Array, code: SketchCode, k_pages: jax.Array, block: jax.Array
) -> None:
    """The arguments of `dispatch_rerank.paged_encode`."""
    axis_sizes(
        mean=(code.mean, "B K H"),
        k_pages=(k_pages, "blocks K page H"),
        block=(block, "B E"),
    )
    _check_encode(codes, code, k_pages, k_pages.shape[2])
    axis_sizes(k_pages=(k_pages, "blocks K page H"), codes=(codes, "blocks K bits W page"))
    check_dtype("block", block, jnp.int32)


def check_slot_encode(
    codes: jax.Array,
    code: SketchCode,
    k_slots: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> None:
    """The arguments of `dispatch_rerank.slot_encode`."""
    axis_sizes(
        mean=(code.mean, "B K H"),
        k_slots=(k_slots, "B K H S page"),
        slot_page=(slot_page, "B K S"),
        page=(page, "B E"),
        block=(block, "B E"),
    )
    _check_encode(codes, code, k_slots, k_slots.shape[4])
    for name, array in (("slot_page", slot_page), ("page", page), ("block", block)):
        check_dtype(name, array, jnp.int32)


def check_offload_pages(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> None:
    """The arguments of `dispatch_rerank.offload_pages`."""
    check_tiers(slots_k, slots_v, host_k, host_v)
    axis_sizes(
        slots_v=(slots_v, "B K S page H"),
        slot_page=(slot_page, "B K S"),
        pages=(page, "B E"),
        block=(block, "B E"),
    )
    for name, array in (("slot_page", slot_page), ("page", page), ("block", block)):
        check_dtype(name, array, jnp.int32)


def check_rerank(
    chosen: jax.Array,
    slot_page: jax.Array,
    lengths: jax.Array,
    since: jax.Array,
    due: jax.Array,
    block_table: jax.Array,
    filled_page: jax.Array,
    stats: RerankStats,
    page_size: int,
) -> None:
    """The arguments of `dispatch_rerank.rerank`."""
    arrays = {
        "chosen": (chosen, "B K n"),
        "slot_page": (slot_page, "B K S"),
        "lengths": (lengths, "B"),
        "since": (since, "B 1" if since.shape[1:] == (1,) else "B K"),
        "due": (due, "B 1" if due.shape[1:] == (1,) else "B K"),
        "block_table": (block_table, "B P"),
        "filled_page": (filled_page, "B E"),
    }
    counts = {f"stats.{name}": (count, "B K") for name, count in vars(stats).items()}
    axis_sizes(**arrays, **counts)
    for name, (array, _) in arrays.items():
        check_dtype(name, array, jnp.int32)
    for name, (count, _) in counts.items():
        sums = name in ("stats.overlap", "stats.rco")
        check_dtype(name, count, jnp.float32 if sums else jnp.int32)
    check_page_size(page_size)


def _check_encode(codes: jax.Array, code: SketchCode, keys: jax.Array, page_size: int) -> None:
    sizes = axis_sizes(
        mean=(code.mean, "B K H"),
        step=(code.step, "B K H"),
        codes=(codes, f"blocks K bits {words(code.mean.shape[-1])} {page_size}"),
    )
    check_bits(codes, sizes["bits"])
    check_dtype("mean", code.mean, jnp.float32)
    check_dtype("step", code.step, jnp.float32)
    check_dtype("codes", codes, jnp.uint32)
    check_float("keys", keys)
    check_page_size(page_size)
