"""Sketches of pages that filled up in plain XLA: keys gathered, encoded, scattered."""

import jax

from flexijax.pallas_kernels import sketches
from flexijax.pallas_kernels.filled import keys_in_blocks, keys_in_slots, set_rows
from flexijax.pallas_kernels.sketches import SketchCode


def paged_encode(
    codes: jax.Array, code: SketchCode, k_pages: jax.Array, block: jax.Array
) -> jax.Array:
    """See `dispatch_rerank.paged_encode`."""
    return _written(codes, code, *keys_in_blocks(k_pages, block))


def slot_encode(
    codes: jax.Array,
    code: SketchCode,
    k_slots: jax.Array,
    slot_page: jax.Array,
    page: jax.Array,
    block: jax.Array,
) -> jax.Array:
    """See `dispatch_rerank.slot_encode`."""
    return _written(codes, code, *keys_in_slots(k_slots, slot_page, page, block))


def _written(codes: jax.Array, code: SketchCode, keys: jax.Array, block: jax.Array) -> jax.Array:
    """Keys [E, B, K, page, H] encoded into the rows int32[E, B, K]."""
    return set_rows(codes, block, sketches.encode(keys, code, bits=codes.shape[2]))
