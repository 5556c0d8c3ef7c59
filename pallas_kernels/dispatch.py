"""The public operations: check the arguments, then choose who computes.

What `implementation` means is in `implementations.py`. Those that choose pages are in
`dispatch_scores.py`, and those that only a rerank calls, beside the moves between the tiers, in
`dispatch_rerank.py`.

Two operations know fewer: `prefill_attention` has neither a Pallas nor a Triton kernel and maps
those names to cuDNN or XLA, as it says; moves between the tiers are Pallas kernels only.
"""

from typing import Literal, overload

import jax

from flexijax.pallas_kernels import checks
from flexijax.pallas_kernels.dispatch_scores import page_scores as page_scores
from flexijax.pallas_kernels.dispatch_scores import select_pages as select_pages
from flexijax.pallas_kernels.dispatch_scores import sketch_query as sketch_query
from flexijax.pallas_kernels.dispatch_scores import sketch_scores as sketch_scores
from flexijax.pallas_kernels.implementations import choose, choose_without_triton, module_of
from flexijax.pallas_kernels.partials import merge as merge
from flexijax.pallas_kernels.stores import AnyStore, PageStore, SlotStore


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
    checks.check_paged_decode(q, k_pages, v_pages, block_ids, token_counts, scale)
    module = module_of("sparse_decode", choose(implementation))
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
    checks.check_slot_decode(q, k_slots, v_slots, token_counts, scale)
    module = module_of("sparse_decode", choose(implementation))
    return module.slot_decode(q, k_slots, v_slots, token_counts, scale=scale)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    stores: tuple[AnyStore, ...],
    arrivals: jax.Array | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, tuple[AnyStore, ...], jax.Array | None]:
    """One layer's attention of a decode step, over the heads of all its stores.

    Each head's new key and value are written to their place, and its queries attend to what its
    store lists, the new token included.

    Args:
      q: float[B, K, G, H]; k, v: float[B, K, H] of the new token, in the stores' dtype, keys
        rotated. The stores must name each of the K heads once.
      arrivals: int32[B, K] of zeros, where programs that share a head count themselves. It comes
        back as it went in: hand it from layer to layer, or each fills one of its own.
      scale: factor of the logits, usually H ** -0.5.
    Returns:
      out [B, K, G, H] in the dtype of `q`, 0 in rows that take no part; the stores with the new
      token, updated in place when donated; arrivals.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_decode_attention(q, k, v, stores, arrivals, scale)
    named = choose(implementation)
    if named == "pallas":
        whole = tuple(store for store in stores if isinstance(store, PageStore | SlotStore))
        if len(whole) < len(stores):
            raise ValueError("rows in several banks, and coded pages, are for implementation='xla'")
        module = module_of("decode_attention", named)
        return module.decode_attention(q, k, v, whole, arrivals, scale=scale)
    kernels = module_of("sparse_decode", named)
    module = module_of("decode_attention", "xla")
    out, kept = module.decode_attention(q, k, v, stores, scale=scale, kernels=kernels)
    return out, kept, arrivals


# Beyond so many rows a sum and a norm are no launches to save, and XLA's are as good.
_FEW_ROWS = 256


def add_norm(
    x: jax.Array,
    parts: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A residual sum x + sum of parts, and its RMS norm (https://arxiv.org/abs/1910.07467).

    Args:
      x: float[..., D]. parts: float32[S, ..., D], of a matrix product, added up and rounded to the
        dtype of `x` before they are added to it. scale: float[D]. eps: added to the mean square.
      implementation: "triton" has no kernel of its own here and takes the Pallas one; None takes
        XLA for many rows.
    Returns:
      The sum, and the sum over its root mean square times scale, both [..., D] in the dtype of `x`.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_add_norm(x, parts, scale, eps)
    if implementation is None and x.size // x.shape[-1] > _FEW_ROWS:
        implementation = "xla"
    module = module_of("add_norm", choose_without_triton(implementation))
    return module.add_norm(x, parts, scale, eps=eps)


@overload
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
    return_lse: Literal[False] = False,
) -> jax.Array: ...


@overload
def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
    return_lse: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * q k^T, causal) v, where query t stands at position start + t.

    Prefill has no kernel in Pallas or Triton, only cuDNN's and XLA. `implementation` therefore maps
    by this rule: "xla" is XLA; None, "pallas" and "triton" are cuDNN where it is installed and
    takes the queries, on a GPU in 16 bits (see `prefill/cudnn.py`), and XLA everywhere else.

    Args:
      q: float[T, K, G, H]; k: float[K, H, S], channels before tokens; v: float[K, S, H].
      start: int32[], tokens before the chunk; keys at start .. start + T - 1 are the chunk's own,
        and what lies beyond them weighs nothing but must be finite.
      scale: factor of the logits, usually H ** -0.5.
      return_lse: whether the log-sum-exp is returned too; static. XLA then computes both, since jax
        rounds the one of cuDNN to the 16 bits of `q`.
    Returns:
      out [T, K, G, H] in the dtype of q, accumulated in float32; with `return_lse` (out, lse), lse
      float32[T, K, G], the log of the sum of exponentiated logits.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks.check_prefill_attention(q, k, v, scale)
    named, cudnn = choose(implementation), module_of("prefill", "cudnn")
    if named != "xla" and not return_lse and cudnn.fits(q):
        return cudnn.prefill_attention(q, k, v, start, scale=scale)
    xla = module_of("prefill", "xla")
    out, lse = xla.prefill_attention(q, k, v, start, scale=scale, return_lse=return_lse)
    return (out, lse) if return_lse else out


def promote(
    slots_k: jax.Array,
    slots_v: jax.Array,
    host_k: jax.Array,
    host_v: jax.Array,
    load: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Pages from the host tier into device slots: slots[b, h, s] = host[load[b, h, s], h].

    The kernel reads pinned host memory directly and writes the slots in place (donate them); only
    the pages that `load` names move. Staged moves are a floor above, in `flexijax.cache.tiers`.

    Args:
      slots_k: float[B, K, H, S, page]; slots_v: float[B, K, S, page, H], in device memory.
      host_k, host_v: float[blocks, K, page, H], in pinned host memory on a GPU.
      load: int32[B, K, S], the block to load into each slot, negative where the slot stays.
    Returns:
      The new slots_k and slots_v.
    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    checks.check_promote(slots_k, slots_v, host_k, host_v, load)
    return module_of("page_moves", "pallas").promote(slots_k, slots_v, host_k, host_v, load)


def offload(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    store_block: jax.Array,
    store_slot: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Pages from device slots into the host tier: host[store_block[b, e], h] = slots[b, h, slot].

    The kernel writes pinned host memory directly, in place (donate it). To XLA, though, a Pallas
    kernel's outputs lie in device memory, aliased to a host argument or not: a caller whose results
    must stay in pinned host memory moves them there within the same program,
    `jax.device_put(x, jax.memory.Space.Host)`.

    Args:
      host_k, host_v: float[blocks, K, page, H], in pinned host memory on a GPU.
      slots_k: float[B, K, H, S, page]; slots_v: float[B, K, S, page, H], in device memory.
      store_block: int32[B, E], the block each entry is written to, negative for none.
      store_slot: int32[B, K, E], the slot it is read from, negative for none. Two entries that name
        one block must come from shared pages, equal in content.
    Returns:
      The new host_k and host_v, in device memory as far as the program is concerned, see above.
    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    checks.check_offload(host_k, host_v, slots_k, slots_v, store_block, store_slot)
    module = module_of("page_moves", "pallas")
    return module.offload(host_k, host_v, slots_k, slots_v, store_block, store_slot)
