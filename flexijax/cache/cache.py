"""The two-tier cache: its static layout and its arrays, each a leaf that is updated in place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.models.config import AttentionShape
from flexijax.pallas_kernels import platform
from flexijax.policies.score import Score


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Every static size of a cache; hashable, so programs are compiled once per layout.

    shape: of the model. paged: per layer, the KV heads that keep all their pages on the device,
    read through the block table; the others are slotted: they keep `slots` pages each in buffers of
    their own. rows: requests at once (B). blocks: rows of each pool. pages: the most pages of one
    request (P). offloads: slotted heads keep every page on the host as well. dtype of keys and
    values. paced: each slotted head has a rerank interval of its own.
    """

    shape: AttentionShape
    paged: tuple[tuple[int, ...], ...]
    rows: int
    blocks: int
    pages: int
    slots: int
    page_size: int
    offloads: bool
    dtype: str
    paced: bool = False

    def slotted(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer that are not paged, ascending."""
        return tuple(h for h in range(self.shape.num_kv_heads) if h not in self.paged[layer])

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page of one KV head."""
        return 2 * self.page_size * self.shape.head_dim * jnp.dtype(self.dtype).itemsize

    @property
    def num_paged(self) -> int:
        """KV heads of all layers that are paged."""
        return sum(len(heads) for heads in self.paged)

    @property
    def num_slotted(self) -> int:
        """KV heads of all layers that are slotted."""
        return self.shape.num_layers * self.shape.num_kv_heads - self.num_paged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pace:
    """When each slotted head of a layer is reranked next."""

    interval: jax.Array  # int32[B, K_s], steps from its last rerank to the next
    wait: jax.Array  # int32[B, K_s], how many of them are left


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The device tier of one layer; a kind of head that the layer has none of holds None.

    Keys in slots stand with the channel before the token, the order in which scoring them is one
    plain matrix product (see `pallas_kernels/xla.py`).
    """

    pages_k: jax.Array | None  # [blocks, K_u, page, H]
    pages_v: jax.Array | None  # [blocks, K_u, page, H]
    paged_summaries: Any  # leaves [blocks, K_u, ...], or None
    paged_state: Any  # leaves [B, K_u, ...], or None
    slots_k: jax.Array | None  # [B, K_s, H, S, page]
    slots_v: jax.Array | None  # [B, K_s, S, page, H]
    slot_page: jax.Array | None  # int32[B, K_s, S], logical page in each slot, -1 empty
    slotted_summaries: Any  # leaves [blocks, K_s, ...], or None
    slotted_state: Any  # leaves [B, K_s, ...], or None
    pace: Pace | None = None  # None: all heads are reranked after every chunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerHost:
    """The host tier of one layer: every page of the slotted heads, in pinned host memory."""

    k: jax.Array  # [blocks, K_s, page, H]
    v: jax.Array  # [blocks, K_s, page, H]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadCounters:
    """The reranks of a layer's slotted heads since a request was admitted; see `schedule.Plan`."""

    reranks: jax.Array  # int32[B, K_s]
    overlap: jax.Array  # float32[B, K_s], sum
    rco: jax.Array  # float32[B, K_s], sum over those reranks at which there was a choice
    choices: jax.Array  # int32[B, K_s], how many those were


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counters:
    """What moved since a request was admitted, counted inside the program."""

    reranks: jax.Array  # int32[B], chunks after which slotted heads were looked at
    promoted: jax.Array  # int32[B], pages host -> device
    offloaded: jax.Array  # int32[B], pages device -> host
    heads: tuple[HeadCounters | None, ...]  # per layer, None without slotted heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Both tiers of a batch of requests."""

    layers: tuple[LayerCache, ...]
    host: tuple[LayerHost | None, ...]
    block_table: jax.Array  # int32[B, P], block of each page; 0 beyond the request's own
    lengths: jax.Array  # int32[B], tokens held; 0 for a free row
    counters: Counters


def init(layout: CacheLayout, score: Score | None) -> Cache:
    """An empty cache, each leaf allocated on its own so that all can be donated.

    score: says what is kept of pages and requests; None where no head ever chooses.
    """
    pairs = [init_layer(layout, score, layer) for layer in range(layout.shape.num_layers)]
    layers, host = zip(*pairs, strict=True)
    return init_tables(layout, layers, host)


def abstract(layout: CacheLayout, score: Score | None) -> Cache:
    """What `init` makes, as `jax.ShapeDtypeStruct`s that lie in the memory of their tier."""
    cache = platform.placed(jax.eval_shape(functools.partial(init, layout, score)))
    return dataclasses.replace(cache, host=platform.placed(cache.host, "pinned_host"))


def init_layer(
    layout: CacheLayout, score: Score | None, layer: int
) -> tuple[LayerCache, LayerHost | None]:
    """One layer's share of `init` in both tiers."""
    page, width = layout.page_size, layout.shape.head_dim
    paged, slotted = len(layout.paged[layer]), len(layout.slotted(layer))
    on_host = slotted and layout.offloads

    def kept_of(heads: int) -> tuple[Any, Any]:
        """Summaries and states of so many heads; None where there are none."""
        if score is None or not heads:
            return None, None
        return (
            score.empty(layout.blocks, heads, width),
            score.empty_state(layout.rows, heads, width),
        )

    def device(*shape: int) -> jax.Array:
        return _zeros(shape, layout.dtype)

    def host() -> jax.Array:
        # NumPy's zeros take no memory until they are copied; jax cannot fill a host array itself.
        empty = np.zeros((layout.blocks, slotted, page, width), layout.dtype)
        return jax.device_put(empty, platform.sharding("pinned_host"))

    def counts() -> jax.Array:
        return _zeros((layout.rows, slotted), "int32")

    paged_summaries, paged_state = kept_of(paged)
    slotted_summaries, slotted_state = kept_of(slotted if on_host else 0)
    pool = (layout.blocks, paged, page, width)
    held = LayerCache(
        pages_k=device(*pool) if paged else None,
        pages_v=device(*pool) if paged else None,
        paged_summaries=paged_summaries,
        paged_state=paged_state,
        slots_k=device(layout.rows, slotted, width, layout.slots, page) if slotted else None,
        slots_v=device(layout.rows, slotted, layout.slots, page, width) if slotted else None,
        slot_page=_zeros((layout.rows, slotted, layout.slots), "int32") - 1 if slotted else None,
        slotted_summaries=slotted_summaries,
        slotted_state=slotted_state,
        pace=Pace(counts(), counts()) if slotted and layout.paced else None,
    )
    return held, LayerHost(host(), host()) if on_host else None


def init_tables(
    layout: CacheLayout, layers: tuple[LayerCache, ...], host: tuple[LayerHost | None, ...]
) -> Cache:
    """A cache of the given layers in which no row is in use and nothing is counted."""

    def heads(layer: int) -> HeadCounters | None:
        if host[layer] is None:
            return None
        shape = (layout.rows, len(layout.slotted(layer)))
        return HeadCounters(*(_zeros(shape, dtype) for dtype in _HEAD_COUNTERS))

    rows = (layout.rows,)
    return Cache(
        layers=layers,
        host=host,
        block_table=_zeros((layout.rows, layout.pages), "int32"),
        lengths=_zeros(rows, "int32"),
        counters=Counters(
            _zeros(rows, "int32"),
            _zeros(rows, "int32"),
            _zeros(rows, "int32"),
            tuple(heads(layer) for layer in range(layout.shape.num_layers)),
        ),
    )


# Of the fields of `HeadCounters`, in order.
_HEAD_COUNTERS = ("int32", "float32", "float32", "int32")


def _zeros(shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jnp.zeros(shape, dtype, device=platform.sharding())
