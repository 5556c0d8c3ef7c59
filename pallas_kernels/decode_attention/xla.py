"""A layer's decode attention store by store: the token is written, then all of it is attended.

Also the form of implementation="triton", whose kernels attend what XLA has written.
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels.partials import merge
from flexijax.pallas_kernels.sparse_decode import xla
from flexijax.pallas_kernels.stores import (
    AnyStore,
    CodedSlotStore,
    CodedStore,
    PageStore,
    SlotStore,
    of_heads,
)


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    stores: tuple[AnyStore, ...],
    *,
    scale: float,
    kernels: ModuleType = xla,
) -> tuple[jax.Array, tuple[AnyStore, ...]]:
    """out and stores of `dispatch.decode_attention`; kernels: `sparse_decode`'s implementation."""
    outs, heads, kept = [], [], []
    for store in stores:
        of_store, new_k, new_v = (of_heads(x, store.heads) for x in (q, k, v))
        store = store.append(new_k, new_v)
        if isinstance(store, PageStore):
            ids, counts = store.listed()
            out, _ = kernels.paged_decode(of_store, store.k, store.v, ids, counts, scale=scale)
        elif isinstance(store, CodedStore | CodedSlotStore):
            out = _coded(of_store, store, scale=scale)
        elif isinstance(store, SlotStore):
            counts = store.counts()
            out, _ = kernels.slot_decode(of_store, store.k, store.v, counts, scale=scale)
        else:
            out, _ = xla.banked_slot_decode(of_store, store.k, store.v, store.counts(), scale=scale)
        outs.append(out)
        heads += store.heads
        kept.append(store)
    # Back from the stores' order of heads to the model's.
    place = tuple(heads.index(head) for head in range(len(heads)))
    return of_heads(jnp.concatenate(outs, axis=1), place), tuple(kept)


def _coded(q: jax.Array, store: CodedStore | CodedSlotStore, *, scale: float) -> jax.Array:
    """Over the coded pages and over the tail, merged."""
    tail, page, bits = store.tail, store.page_size, store.bits
    if isinstance(store, CodedStore):
        ids = store.listed()
        pages = xla.coded_decode(q, store.codes, ids, page_size=page, bits=bits, scale=scale)
    else:
        counts = store.counts()
        pages = xla.coded_slot_decode(
            q, store.slots, counts, page_size=page, bits=bits, scale=scale
        )
    parts = (pages, xla.slot_decode(q, tail.k, tail.v, tail.counts(), scale=scale))
    outs, lses = (jnp.stack(of) for of in zip(*parts, strict=True))
    return merge(outs, lses)[0]
