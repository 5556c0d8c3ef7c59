"""The public operations that only a rerank calls: check the arguments, then choose who computes.

As `dispatch.py`, but none has a Triton kernel: "triton" takes the one in Pallas.
"""

import jax

from flexijax.pallas_kernels import score_checks as checks
from flexijax.pallas_kernels.implementations import choose_without_triton, module_of
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
    checks.check_paged_encode(codes, code, k_pages, block)
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
    checks.check_slot_encode(codes, code, k_slots, slot_page, page, block)
    module = module_of("sketch_encode", choose_without_triton(implementation))
    return module.slot_encode(codes, code, k_slots, slot_page, page, block)
