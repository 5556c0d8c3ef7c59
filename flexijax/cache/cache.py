"""Both tiers of a batch of requests: head groups of every layer, each array updated in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from flexijax.cache import dense, evicting, offloaded, selected
from flexijax.cache.arrays import zeros
from flexijax.cache.evicting import EvictionStats
from flexijax.cache.layout import CacheLayout, CacheSizes, GroupProgram, without_heads
from flexijax.cache.offloaded import RerankStats
from flexijax.cache.tiers import HostPages, abstract_host, empty_host
from flexijax.pallas_kernels import platform
from flexijax.policies.base import HOST, HeadGroup, Policy

_KINDS: dict[str, ModuleType] = {
    "dense": dense,
    "selected": selected,
    "offloaded": offloaded,
    "evicting": evicting,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer, a tuple of head groups; each group has its host tier and statistics, or None."""

    groups: tuple[Any, ...]  # DenseGroup, SelectedGroup, OffloadedGroup, EvictingGroup
    host: tuple[HostPages | None, ...]
    stats: tuple[RerankStats | EvictionStats | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Both tiers of a batch of requests."""

    layers: tuple[LayerCache, ...]
    block_table: jax.Array  # int32[B, P], block of each page; 0 beyond the request's own
    lengths: jax.Array  # int32[B], tokens held; 0 for a free row
    settled: jax.Array  # int32[B], tokens held at the last end of a chunk, or the prompt's
    chunks: jax.Array  # int32[B], chunks of decode steps since the request was admitted


def kind(group: HeadGroup) -> ModuleType:
    """The functions over groups of that kind.

    empty, store, after_step, commit, end_chunk; of the last: has_chunk_end, num_queries. Of kinds
    whose pages all lie by block, and may be shared: read_pages.
    """
    return _KINDS[group.kind]


def keeps_all_by_block(layout: CacheLayout) -> bool:
    """Whether every page of a request can be read by its block id, so that blocks can be shared."""
    return all(hasattr(kind(group), "read_pages") for *_, group in layout.all_groups())


def group_programs(
    layout: CacheLayout,
    policy: Policy,
    layer: int,
    *,
    implementation: str | None,
    transfer: str | None,
) -> tuple[GroupProgram, ...]:
    """What the programs over a layer are compiled for, equal for layers of one kind."""
    return tuple(
        GroupProgram(layout.sizes, without_heads(group), policy, implementation, transfer)
        for group in layout.groups[layer]
    )


def init(layout: CacheLayout, policy: Policy) -> Cache:
    """An empty cache, each leaf allocated on its own so that all can be donated."""
    return init_tables(
        layout, tuple(init_layer(layout, policy, layer) for layer in range(len(layout.groups)))
    )


def init_layer(layout: CacheLayout, policy: Policy, layer: int) -> LayerCache:
    """One layer of `init`."""
    made = platform.put(_on_device(layout, policy, layer))
    return dataclasses.replace(made, host=_host(layout, layer, empty_host))


def init_tables(layout: CacheLayout, layers: tuple[LayerCache, ...]) -> Cache:
    """A cache of the given layers in which no row is in use."""
    sizes = layout.sizes
    rows = (sizes.batch,)
    return Cache(
        layers=layers,
        block_table=zeros((sizes.batch, sizes.pages), "int32"),
        lengths=zeros(rows, "int32"),
        settled=zeros(rows, "int32"),
        chunks=zeros(rows, "int32"),
    )


def reset_row(cache: Cache, row: jax.Array, blocks: jax.Array, length: jax.Array) -> Cache:
    """A cache whose row `row` holds `length` tokens in `blocks`, int32[P]."""
    return dataclasses.replace(
        cache,
        block_table=cache.block_table.at[row].set(blocks),
        lengths=cache.lengths.at[row].set(length),
        settled=cache.settled.at[row].set(length),
        chunks=cache.chunks.at[row].set(0),
    )


@functools.lru_cache(maxsize=8)
def abstract(layout: CacheLayout, policy: Policy) -> Cache:
    """What `init` makes, as `jax.ShapeDtypeStruct`s that lie in the memory of their tier."""
    # Kept, since it takes 50 ms and every call of `generate` asks for it several times.
    known: dict[Any, LayerCache] = {}
    for layer, groups in enumerate(layout.groups):
        alike = tuple((without_heads(group), len(group.heads)) for group in groups)
        if alike not in known:
            made = jax.eval_shape(functools.partial(_on_device, layout, policy, layer))
            host = platform.placed(_host(layout, layer, abstract_host), "pinned_host")
            known[alike] = dataclasses.replace(platform.placed(made), host=host)
        known[layer] = known[alike]
    layers = tuple(known[layer] for layer in range(len(layout.groups)))
    return dataclasses.replace(
        platform.placed(jax.eval_shape(functools.partial(init_tables, layout, ()))), layers=layers
    )


def _on_device(layout: CacheLayout, policy: Policy, layer: int) -> LayerCache:
    """One layer without its host tier."""
    groups, stats = [], []
    programs = group_programs(layout, policy, layer, implementation=None, transfer=None)
    for program, group in zip(programs, layout.groups[layer], strict=True):
        arrays, counts = kind(group).empty(program, len(group.heads))
        groups.append(arrays)
        stats.append(counts)
    return LayerCache(tuple(groups), (), tuple(stats))


def _host(
    layout: CacheLayout, layer: int, make: Callable[[CacheSizes, int], HostPages]
) -> tuple[HostPages | None, ...]:
    """One layer's host tier: None for groups that have none."""
    return tuple(
        make(layout.sizes, len(group.heads)) if group.ladder[-1].memory == HOST else None
        for group in layout.groups[layer]
    )
