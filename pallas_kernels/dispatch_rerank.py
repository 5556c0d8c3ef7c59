"""The public operations that only a rerank calls: check the arguments, then choose who computes.

As `dispatch.py`, but none has a Triton kernel: "triton" takes the one in Pallas. Moves, here as
there, are Pallas kernels only; staged ones are in `flexijax.cache.tiers`.
"""

import jax

from flexijax.pallas_kernels import checks_rerank
from flexijax.pallas_kernels.implementations import choose_without_triton, module_of
from flexijax.pallas_kernels.rerank import Reranked, RerankStats
from flexijax.pallas_kernels.sketches import SketchCode


def paged_encode(
    codes: jax.Array,
    code: SketchCode,
    k_pages: jax.Array,
    block: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sketches of the listed pages of a pool, written into their rows: codes[block[b, e]].

    Args:
      codes: uint32[blocks, K, bits, W, page], bit planes packed as `sketches` says; donate it.
      code: `SketchCode` of leaves float32[B, K, H]: request b's pages are rounded by code[b].
      k_pages: float[blocks, K, page, H], read for the listed pages only.
      block: int32[B, E], full pages, negative for none. Two entries that name one block must be
        rounded alike.
    Returns:
      The new codes.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks_rerank.check_paged_encode(codes, code, k_pages, block)
    module = module_of("sketch_encode", choose_without_triton(implementation))
    return module.paged_encode(codes, code, k_pages, block)


def slot_encode(
    codes: jax.Array,
    code: SketchCode,
    k_slots: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """As `paged_encode`, of pages that lie in the heads' own slots.

    Args:
      codes, code: as `paged_encode`.
      k_slots: float[B, K, H, S, page], read for the named pages only.
      slot_page: int32[B, K, S], the page in each slot, none twice in a head; negative for none.
      page: int32[B, E], full pages, negative for none. A head in whose slots it is not keeps its
        codes.
      block: int32[B, E], the row of each page, negative for none.
    Returns:
      The new codes.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks_rerank.check_slot_encode(codes, code, k_slots, slot_page, page, block)
    module = module_of("sketch_encode", choose_without_triton(implementation))
    return module.slot_encode(codes, code, k_slots, slot_page, page, block)


def offload_pages(
    host_k: jax.Array,
    host_v: jax.Array,
    slots_k: jax.Array,
    slots_v: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `dispatch.offload`, of pages that each head looks for in its slots.

    Args:
      host_k, host_v, slots_k, slots_v: as there.
      slot_page: int32[B, K, S], the page in each slot, none twice in a head; negative for none.
      page: int32[B, E], negative for none. A head in whose slots it is not moves nothing.
      block: int32[B, E], the block each page is written to, negative for none.
    Returns:
      The new host_k and host_v, in device memory as far as the program is concerned, see there.
    Raises:
      ValueError: shapes or dtypes do not fit.
    """
    checks_rerank.check_offload_pages(host_k, host_v, slots_k, slots_v, slot_page, page, block)
    module = module_of("page_moves", "pallas")
    return module.offload_pages(host_k, host_v, slots_k, slots_v, slot_page, page, block)


def rerank(
    chosen: jax.Array,
    slot_page: jax.Array,
    lengths: jax.Array,
    since: jax.Array,
    due: jax.Array,
    block_table: jax.Array,
    filled_page: jax.Array,
    stats: RerankStats,
    *,
    page_size: int,
    after: tuple[jax.Array, ...] = (),
    implementation: str | None = None,
) -> Reranked:
    """The scheduler step: which chosen pages come into which slots, and what is counted of it.

    Args:
      chosen: int32[B, K, n], pages to be resident, none twice, negative for none; the newest page
        is among them, and none is beyond it.
      slot_page: int32[B, K, S], pages in the slots now, none twice, -1 for none; donate it.
      lengths: int32[B], tokens held, 0 for a row that takes no part.
      since: int32[B, K] or [B, 1], tokens held at a head's last rerank.
      due: int32[B, K] or [B, 1], positive for heads that are reranked; the others stay as they are.
      block_table: int32[B, P], the block of each page; read for chosen pages only.
      filled_page: int32[B, E], pages that were offloaded, from heads that hold them in a slot;
        negative for none.
      stats: `RerankStats` of leaves [B, K], int32 and float32; donate it.
      page_size: tokens a page. after: not read, but made first: what comes of all else that reads
        `slot_page`, which XLA would copy if that came later than what is written in its place.
    Returns:
      `Reranked`; see `rerank.plan_rerank` for the order in which slots are filled.
    Raises:
      ValueError: shapes or dtypes do not fit, or `implementation` is unknown or cannot run here.
    """
    checks_rerank.check_rerank(
        chosen, slot_page, lengths, since, due, block_table, filled_page, stats, page_size
    )
    return module_of("rerank_plan", choose_without_triton(implementation)).rerank(
        chosen,
        slot_page,
        lengths,
        since,
        due,
        block_table,
        filled_page,
        stats,
        page_size=page_size,
        after=after,
    )
