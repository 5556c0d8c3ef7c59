"""Whether the two tiers of a cache hold the same pages, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np

from bench.gpu.data import same_bits
from flexijax.cache.cache import Cache, all_rows
from flexijax.cache.layout import CacheLayout
from flexijax.cache.tiers import HostPages


def compared_pages(
    layout: CacheLayout, cache: Cache, layers: Iterable[int] | None = None
) -> tuple[int, int]:
    """(pages compared, of them unequal): each full page in a slot and its copy on the host.

    layers: those that are looked at; None is all.
    """
    page_size, compared, unequal = layout.sizes.page_size, 0, 0
    wanted = set(range(len(layout.groups)) if layers is None else layers)
    rows = all_rows(cache)
    lengths, table = jax.device_get((rows.lengths, rows.block_table))
    for layer, at, group in layout.all_groups():
        if group.kind != "offloaded" or layer not in wanted:
            continue
        group, host = rows.layers[layer].groups[at], rows.layers[layer].host[at]
        assert isinstance(host, HostPages)
        slot_page, slots_k, slots_v, host_k, host_v = jax.device_get(
            (group.slot_page, group.k, group.v, host.k, host.v)
        )
        full = (slot_page >= 0) & ((slot_page + 1) * page_size <= lengths[:, None, None])
        b, head, slot = np.nonzero(full)
        block = table[b, slot_page[b, head, slot]]
        pairs = (
            (slots_k[b, head, :, slot].swapaxes(1, 2), host_k[block, head]),
            (slots_v[b, head, slot], host_v[block, head]),
        )
        for slots, copies in pairs:
            if not same_bits(slots, copies):
                differ = (_bits(slots) != _bits(copies)).any((1, 2))
                unequal += int(differ.sum())
        compared += len(b)
    return compared, unequal


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"uint{8 * x.dtype.itemsize}")
