"""How many bytes a cache takes in each tier, and how many this machine can give."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
from typing import Any

import jax

from flexijax.cache.cache import abstract
from flexijax.cache.layout import CacheLayout, page_bytes, slots_of, tail_pages
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.host_memory import available_host_bytes
from flexijax.policies.base import HOST, HeadGroup, Policy
from flexijax.policies.page_score import PageScore, PageShape


@dataclasses.dataclass(frozen=True)
class RequestBytes:
    """Of one request. device: keys, values and summaries on the device; summaries: of those.

    host: its pages on the host. full: what dense keys and values of its length would take.
    """

    device: int
    summaries: int
    host: int
    full: int


def cache_bytes(layout: CacheLayout, policy: Policy) -> tuple[int, int]:
    """(device bytes, host bytes) of the arrays of a whole cache."""
    cache = abstract(layout, policy)
    host = nbytes([layer.host for layer in cache.all_pools])
    return nbytes(cache) - host, host


def request_bytes(layout: CacheLayout, length: int) -> RequestBytes:
    """What a request of `length` tokens that has been decoded needs in each tier."""
    sizes = layout.sizes
    pages = -(-length // sizes.page_size)
    device = summaries = host = 0
    for *_, group in layout.all_groups():
        heads = len(group.heads)
        held = min(slots_of(group, sizes), pages)
        device += heads * held * page_bytes(sizes, group.ladder[0].codec)
        if group.ladder[0].codec is not None:  # what is not full yet
            device += heads * tail_pages(sizes) * sizes.page_bytes
        summaries += heads * (pages * summary_bytes(layout, group) + state_bytes(layout, group))
        if group.ladder[-1].memory == HOST:
            on_host = page_bytes(sizes, group.ladder[-1].codec)
            host += heads * (length // sizes.page_size) * on_host
    full = sizes.shape.num_layers * sizes.shape.num_kv_heads * pages * sizes.page_bytes
    return RequestBytes(device + summaries, summaries, host, full)


def summary_bytes(layout: CacheLayout, group: HeadGroup) -> int:
    """Bytes that the group's score keeps of one page of one KV head."""
    return 0 if group.score is None else _score_bytes(group.score, layout.sizes.page)[0]


def state_bytes(layout: CacheLayout, group: HeadGroup) -> int:
    """Bytes that the group's score keeps of one KV head of one request, beside its pages'."""
    return 0 if group.score is None else _score_bytes(group.score, layout.sizes.page)[1]


def nbytes(tree: Any) -> int:
    """Bytes of all leaves, arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=64)
def _score_bytes(score: PageScore, page: PageShape) -> tuple[int, int]:
    made = jax.eval_shape(lambda: (score.empty(1, 1, page), score.empty_state(1, 1, page)))
    return nbytes(made[0]), nbytes(made[1])


def available_bytes() -> tuple[int, int]:
    """(device, host) bytes that can still be taken; both the same memory where there is no GPU.

    On a GPU the host's are pinned, of which XLA has a pool of its own with a limit.
    """
    host, pinned = available_host_bytes(), platform.max_pinned_bytes()
    device = platform.free_device_bytes()
    return (host if device is None else device), (host if pinned is None else min(host, pinned))


def trim_heap() -> None:
    """Gives the holes in the C library's heap back to the system, where it is glibc.

    Of what tracing and compiling leave behind it would keep most: 170 MB of 330 after the decode
    chunk of a model of 30 layers.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
