"""The public operations: check the arguments, then choose who computes.

`implementation` is None (Pallas on a GPU, XLA elsewhere), "xla", "pallas" (on a CPU in interpret
mode: slow, for tests) or "triton" (jax-triton, GPU only). A named one that cannot run raises.
"""

import importlib.util
from types import ModuleType

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import page_moves, platform
from flexijax.pallas_kernels import page_scores as _pallas_scores
from flexijax.pallas_kernels import sketch_scores as _pallas_sketches
from flexijax.pallas_kernels import sparse_decode as _pallas_decode
from flexijax.pallas_kernels.partials import merge as merge
from flexijax.pallas_kernels.sketches import SPACING, SketchQuery, words
from flexijax.pallas_kernels.summaries import QuantizedSummaries, Summaries, group_size

IMPLEMENTATIONS = ("xla", "pallas", "triton")


def page_scores(
    q: jax.Array,
    summaries: Summaries,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Upper bound of q.k over every page: max over G of sum over H of max(q*max, q*min).

    Quest, https://arxiv.org/abs/2406.10774, equation 2.

    Args:
      q: float[B, K, G, H], unscaled.
      summaries: float[blocks, K, 2, H], minimum then maximum, or `QuantizedSummaries` of it.
      block_table: int32[B, P], the block of each page; not read beyond a request's length.
      lengths: int32[B], tokens of each request.
      page_size: tokens a page.
    Returns:
      float32[B, K, P]; -inf at and beyond page ceil(length / page_size).
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    quantized = isinstance(summaries, QuantizedSummaries)
    values = summaries.values if quantized else summaries
    sizes = _sizes(
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
        _check_dtype("summaries.values", values, jnp.int8)
        _check_dtype("summaries.exponents", summaries.exponents, jnp.uint8)
    else:
        _check_float("summaries", values)
    _check_float("q", q)
    _check_dtype("block_table", block_table, jnp.int32)
    _check_dtype("lengths", lengths, jnp.int32)
    _check_page(page_size)
    chosen = _choose(implementation)
    module = _pallas_scores if chosen == "pallas" else _module(chosen, "page_scores_triton")
    return module.page_scores(q, summaries, block_table, lengths, page_size=page_size)


def sketch_scores(
    query: SketchQuery,
    codes: jax.Array,
    block_table: jax.Array,
    lengths: jax.Array,
    *,
    page_size: int,
    implementation: str | None = None,
) -> jax.Array:
    """Log of the sum of exp(offset + unit * sum over H of weight * code) over a page's tokens.

    Args:
      query: `SketchQuery` of weights int8[B, K, G, H] and offset, unit float32[B, K, G].
      codes: uint32[blocks, K, bits, W, page], bit planes packed as `sketches` says.
      block_table: int32[B, P], the block of each page; read for full pages only.
      lengths: int32[B], tokens of each request.
      page_size: tokens a page.
    Returns:
      float32[B, K, G, P]; -inf for a page that is not full.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    sizes = _sizes(
        weights=(query.weights, "B K G H"),
        offset=(query.offset, "B K G"),
        unit=(query.unit, "B K G"),
        codes=(codes, f"blocks K bits {words(query.weights.shape[-1])} {page_size}"),
        block_table=(block_table, "B P"),
        lengths=(lengths, "B"),
    )
    if sizes["bits"] not in SPACING:
        raise ValueError(
            f"codes has shape {codes.shape}: bits must be one of {tuple(SPACING)}, "
            f"got {sizes['bits']}"
        )
    _check_dtype("weights", query.weights, jnp.int8)
    _check_dtype("offset", query.offset, jnp.float32)
    _check_dtype("unit", query.unit, jnp.float32)
    _check_dtype("codes", codes, jnp.uint32)
    _check_dtype("block_table", block_table, jnp.int32)
    _check_dtype("lengths", lengths, jnp.int32)
    _check_page(page_size)
    chosen = _choose(implementation)
    module = (
        _pallas_sketches
        if chosen == "pallas"
        else _module(chosen, "sketch_scores_triton", xla="sketch_scores_xla")
    )
    return module.sketch_scores(query, codes, block_table, lengths, page_size=page_size)


def paged_decode(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_ids: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query token per head over the listed pages of a pool.

    Args:
      q: float[B, K, G, H]; k_pages, v_pages: float[blocks, K, page, H], keys rotated.
      block_ids: int32[B, K, n], pages each head reads, in any order, -1 for none.
      token_counts: int32[B, K, n], how many first tokens of each page count; 0 where not read.
      scale: factor of the logits, usually H ** -0.5.
    Returns:
      out [B, K, G, H] in the dtype of `q`, and lse float32[B, K, G], the log of the sum of
      exponentiated logits; 0 and -inf for a head that reads nothing.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    _sizes(
        q=(q, "B K G H"),
        k_pages=(k_pages, "blocks K page H"),
        v_pages=(v_pages, "blocks K page H"),
        block_ids=(block_ids, "B K n"),
        token_counts=(token_counts, "B K n"),
    )
    _check_attention(q, k_pages, v_pages, scale)
    _check_page(k_pages.shape[2])
    _check_dtype("block_ids", block_ids, jnp.int32)
    _check_dtype("token_counts", token_counts, jnp.int32)
    chosen = _choose(implementation)
    module = _pallas_decode if chosen == "pallas" else _module(chosen, "sparse_decode_triton")
    return module.paged_decode(q, k_pages, v_pages, block_ids, token_counts, scale=scale)


def slot_decode(
    q: jax.Array,
    k_slots: jax.Array,
    v_slots: jax.Array,
    token_counts: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query token per head over the head's own contiguous slots.

    Args:
      q: float[B, K, G, H]; k_slots: float[B, K, H, S, page], keys rotated, channels before tokens,
        the order in which scoring is a plain matrix product; v_slots: float[B, K, S, page, H].
      token_counts: int32[B, K, S], how many first tokens of each slot count; 0 where not read.
      scale: factor of the logits, usually H ** -0.5.
    Returns:
      out and lse as `paged_decode`.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    _sizes(
        q=(q, "B K G H"),
        k_slots=(k_slots, "B K H S page"),
        v_slots=(v_slots, "B K S page H"),
        token_counts=(token_counts, "B K S"),
    )
    _check_attention(q, k_slots, v_slots, scale)
    _check_page(k_slots.shape[4])
    _check_dtype("token_counts", token_counts, jnp.int32)
    chosen = _choose(implementation)
    module = _pallas_decode if chosen == "pallas" else _module(chosen, "sparse_decode_triton")
    return module.slot_decode(q, k_slots, v_slots, token_counts, scale=scale)


def promote(
    slots_k: jax.Array,
    slots_v: jax.Array,
    host_k: jax.Array,
    host_v: jax.Array,
    load: jax.Array,
    *,
    transfer: str = "zero_copy",
) -> tuple[jax.Array, jax.Array]:
    """Pages from the host tier into device slots: slots[b, h, s] = host[load[b, h, s], h].

    The kernel reads pinned host memory directly and writes the slots in place (donate them); only
    the pages that `load` names move.

    Args:
      slots_k: float[B, K, H, S, page]; slots_v: float[B, K, S, page, H], in device memory.
      host_k, host_v: float[blocks, K, page, H], in pinned host memory on a GPU.
      load: int32[B, K, S], the block to load into each slot, negative where the slot stays.
      transfer: "zero_copy"; staged moves are made a floor above, in `flexijax.cache.tiers`.
    Returns:
      The new slots_k and slots_v.
    """
    _check_moves(slots_k, slots_v, host_k, host_v, transfer)
    _sizes(slots_v=(slots_v, "B K S page H"), load=(load, "B K S"))
    _check_dtype("load", load, jnp.int32)
    return page_moves.promote(slots_k, slots_v, host_k, host_v, load)


def offload(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    store_block: jax.Array,
    store_slot: jax.Array,
    *,
    transfer: str = "zero_copy",
) -> tuple[jax.Array, jax.Array]:
    """Pages from device slots into the host tier: host[store_block[b, e], h] = slots[b, h, slot].

    The kernel writes pinned host memory directly, in place (donate it).

    Args:
      host_k, host_v: float[blocks, K, page, H], in pinned host memory on a GPU.
      slots_k: float[B, K, H, S, page]; slots_v: float[B, K, S, page, H], in device memory.
      store_block: int32[B, E], the block each entry is written to, negative for none.
      store_slot: int32[B, K, E], the slot it is read from, negative for none. Two entries that name
        one block must come from shared pages, equal in content.
      transfer: as in `promote`.
    Returns:
      The new host_k and host_v.
    """
    _check_moves(slots_k, slots_v, host_k, host_v, transfer)
    _sizes(
        slots_v=(slots_v, "B K S page H"),
        store_block=(store_block, "B E"),
        store_slot=(store_slot, "B K E"),
    )
    _check_dtype("store_block", store_block, jnp.int32)
    _check_dtype("store_slot", store_slot, jnp.int32)
    return page_moves.offload(host_k, host_v, slots_k, slots_v, store_block, store_slot)


def _choose(implementation: str | None) -> str:
    chosen = platform.default_implementation() if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {chosen!r}")
    if chosen == "triton":
        if importlib.util.find_spec("jax_triton") is None:
            raise ValueError(
                "implementation='triton' needs jax-triton: pip install 'flexijax[cuda12]'"
            )
        if not platform.is_gpu():
            raise ValueError("implementation='triton' runs on NVIDIA GPUs only, not on this device")
    return chosen


def _module(chosen: str, twin: str, *, xla: str = "xla") -> ModuleType:
    """XLA's module or the named Triton twin, imported when first used: triton is optional."""
    name = xla if chosen == "xla" else twin
    return importlib.import_module(f"flexijax.pallas_kernels.{name}")


def _sizes(**arrays: tuple[jax.Array, str]) -> dict[str, int]:
    """The size of every named axis; raises where an array contradicts itself or an earlier one."""
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}
    for name, (array, axes) in arrays.items():
        letters = axes.split()
        described = f"{name}[{', '.join(letters)}]"
        if len(array.shape) != len(letters):
            raise ValueError(f"{described} has {len(letters)} axes, got shape {array.shape}")
        for axis, size in zip(letters, array.shape, strict=True):
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
        _check_float(name, array)
    if k.dtype != v.dtype:
        raise ValueError(f"keys and values must have one dtype, got {k.dtype} and {v.dtype}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _check_moves(
    slots_k: jax.Array, slots_v: jax.Array, host_k: jax.Array, host_v: jax.Array, transfer: str
) -> None:
    if transfer != "zero_copy":
        raise ValueError(f"transfer must be 'zero_copy' here, got {transfer!r}")
    _sizes(
        slots_k=(slots_k, "B K H S page"),
        slots_v=(slots_v, "B K S page H"),
        host_k=(host_k, "blocks K page H"),
        host_v=(host_v, "blocks K page H"),
    )
    dtypes = {str(x.dtype) for x in (slots_k, slots_v, host_k, host_v)}
    if len(dtypes) > 1:
        raise ValueError(f"slots and host pages must have one dtype, got {sorted(dtypes)}")


def _check_float(name: str, array: jax.Array) -> None:
    if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {array.dtype}")


def _check_dtype(name: str, array: jax.Array, dtype: type) -> None:
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {jnp.dtype(dtype).name}, got {array.dtype}")


def _check_page(page_size: int) -> None:
    if page_size < 1 or page_size & (page_size - 1):
        raise ValueError(f"page size must be a power of two, got {page_size}")
