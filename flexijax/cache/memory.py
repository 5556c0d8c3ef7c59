"""How many bytes a cache takes in each tier, and how many this machine can give."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import Any

import jax

from flexijax.cache import cache as kv
from flexijax.pallas_kernels import platform
from flexijax.policies.base import Policy


def cache_bytes(layout: kv.CacheLayout, policy: Policy) -> tuple[int, int]:
    """(device bytes, host bytes) of the arrays of a whole cache and its prefill workspace."""
    heads = layout.shape.num_layers * layout.shape.num_kv_heads
    paged = layout.num_paged * layout.blocks
    slotted = layout.num_slotted * layout.rows * layout.slots
    device = (paged + slotted + heads * layout.pages) * layout.page_bytes
    summarized = layout.num_paged + (layout.num_slotted if layout.offloads else 0)
    device += summarized * layout.blocks * summary_bytes(layout, policy)
    device += summarized * layout.rows * state_bytes(layout, policy)
    host = layout.num_slotted * layout.blocks * layout.page_bytes if layout.offloads else 0
    return device, host


def request_bytes(layout: kv.CacheLayout, policy: Policy, length: int) -> tuple[int, int, int, int]:
    """(device bytes with summaries, summaries, host bytes, dense KV) of a request of `length`."""
    pages = -(-length // layout.page_size)
    heads = layout.shape.num_layers * layout.shape.num_kv_heads
    full = heads * pages * layout.page_bytes
    slots = min(layout.slots, pages)
    device = (layout.num_paged * pages + layout.num_slotted * slots) * layout.page_bytes
    summarized = layout.num_paged + (layout.num_slotted if layout.offloads else 0)
    summaries = summarized * (pages * summary_bytes(layout, policy) + state_bytes(layout, policy))
    host = layout.num_slotted * pages * layout.page_bytes if layout.offloads else 0
    return device + summaries, summaries, host, full


def summary_bytes(layout: kv.CacheLayout, policy: Policy) -> int:
    """Bytes that the policy keeps of one page of one KV head."""
    score = policy.score
    return 0 if score is None else _bytes(score.empty, layout)


def state_bytes(layout: kv.CacheLayout, policy: Policy) -> int:
    """Bytes that the policy keeps of one KV head of one request, beside its pages' summaries."""
    score = policy.score
    return 0 if score is None else _bytes(score.empty_state, layout)


def _bytes(empty: Callable[[int, int, int], Any], layout: kv.CacheLayout) -> int:
    leaves = jax.eval_shape(lambda: empty(1, 1, layout.shape.head_dim))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def available_bytes() -> tuple[int, int]:
    """(device, host) bytes that can still be taken; both the same memory where there is no GPU."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        pages = int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        pass  # not Linux: what the C library calls free is the next best
    stats = jax.devices()[0].memory_stats() if platform.is_gpu() else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"], pages
    return pages, pages


def trim_heap() -> None:
    """Gives the holes in the C library's heap back to the system, where it is glibc.

    Of what tracing and compiling leave behind it would keep most: 170 MB of 330 after the decode
    chunk of a model of 30 layers.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
