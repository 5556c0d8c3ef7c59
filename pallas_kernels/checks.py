"""What each public operation demands of its arguments; every failure is a ValueError."""

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.page_codes.xla import page_words
from flexijax.pallas_kernels.stores import (
    AnyStore,
    BankedStore,
    CodedSlotStore,
    CodedStore,
    PageStore,
)


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


def check_decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    stores: tuple[AnyStore, ...],
    arrivals: jax.Array | None,
    scale: float,
) -> None:
    """The arguments of `dispatch.decode_attention`."""
    sizes = axis_sizes(q=(q, "B K G H"), k=(k, "B K H"), v=(v, "B K H"))
    if arrivals is not None:
        axis_sizes(q=(q, "B K G H"), arrivals=(arrivals, "B K"))
        check_dtype("arrivals", arrivals, jnp.int32)
    named = sorted(head for store in stores for head in store.heads)
    if named != list(range(sizes["K"])):
        raise ValueError(f"stores name heads {named}; each of 0 .. {sizes['K'] - 1} must be in one")
    if len({store.page_size for store in stores}) > 1:
        raise ValueError(f"stores differ in page size: {[store.page_size for store in stores]}")
    check_page_size(stores[0].page_size)
    rows, width = sizes["B"], sizes["H"]
    for store in stores:
        heads = len(store.heads)
        if isinstance(store, PageStore):
            axes = {
                "k": (store.k, f"blocks {heads} page {width}"),
                "v": (store.v, f"blocks {heads} page {width}"),
                "pages": (store.pages, f"{rows} {heads} n"),
                "block_table": (store.block_table, f"{rows} P"),
                "held": (store.held, f"{rows}"),
            }
        elif isinstance(store, CodedStore | CodedSlotStore):
            axes = {
                "k": (store.tail.k, f"{rows} {heads} {width} T page"),
                "v": (store.tail.v, f"{rows} {heads} T page {width}"),
                "coded": (store.coded, f"{rows}"),
                "held": (store.tail.held, f"{rows}"),
            }
            words = page_words(store.page_size, width, store.bits)
            if isinstance(store, CodedStore):
                coded = {"codes": (store.codes, f"blocks {heads} {words}")}
                axes["pages"] = (store.pages, f"{rows} {heads} n")
                axes["block_table"] = (store.block_table, f"{rows} P")
            else:
                each = f"{rows // len(store.slots)} {heads} S {words}"
                coded = {f"slots{at}": (bank, each) for at, bank in enumerate(store.slots)}
                axes["slot_page"] = (store.slot_page, f"{rows} {heads} S")
            axis_sizes(**coded)
            for name, (array, _) in coded.items():
                check_dtype(name, array, jnp.uint32)
        else:
            if isinstance(store, BankedStore):
                banks = list(zip(store.k, store.v, strict=True))
            else:
                banks = [(store.k, store.v)]
            axes = {"held": (store.held, f"{rows} {heads}" if store.held.ndim == 2 else f"{rows}")}
            for bank, (of_k, of_v) in enumerate(banks):
                axes[f"k{bank}"] = (of_k, f"{rows // len(banks)} {heads} {width} S page")
                axes[f"v{bank}"] = (of_v, f"{rows // len(banks)} {heads} S page {width}")
            if store.slot_page is not None:
                axes["slot_page"] = (store.slot_page, f"{rows} {heads} S")
        axis_sizes(**axes)
        for name, (array, _) in axes.items():
            if name[0] not in "kv":
                check_dtype(name, array, jnp.int32)
            elif array.dtype != k.dtype or array.dtype != v.dtype:
                raise ValueError(
                    f"k and v must have the stores' dtype {array.dtype}, got {k.dtype}"
                )
    _check_attention(q, k, v, scale)


def check_add_norm(x: jax.Array, parts: jax.Array, scale: jax.Array, eps: float) -> None:
    """The arguments of `dispatch.add_norm`."""
    if parts.shape[1:] != x.shape or not len(parts):
        raise ValueError(f"parts has shape {parts.shape}, expected one or more of x's {x.shape}")
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale has shape {scale.shape}, expected {x.shape[-1:]} as x's last axis")
    check_float("x", x)
    check_float("scale", scale)
    check_dtype("parts", parts, jnp.float32)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and not negative, got {eps}")


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
    check_scale(scale)


def check_scale(scale: float) -> None:
    """Positive and finite."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale must be positive and finite, got {scale}")


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
