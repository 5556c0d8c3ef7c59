"""Both tiers of a batch of requests: pools of blocks and banks of rows, updated in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax

from flexijax.cache import dense, evicting, offloaded, selected
from flexijax.cache.arrays import replaced, zeros
from flexijax.cache.banks import by_block, by_row, side_by_side, together
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


class Standing(NamedTuple):
    """Where some rows stand."""

    block_table: jax.Array  # int32[B, P], block of each page; 0 beyond the request's own
    lengths: jax.Array  # int32[B], tokens held; 0 for a free row
    settled: jax.Array  # int32[B], tokens held at the last end of a chunk, or the prompt's
    chunks: jax.Array  # int32[B], chunks of decode steps since the request was admitted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """Some rows, and of each layer what lies by row: arrays of its groups, and statistics."""

    layers: tuple[LayerCache, ...]
    standing: Standing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Both tiers of a batch of requests.

    pools: of each layer what lies by block, for all rows: arrays of its groups, and the host tier.
    Row r is row r % b of bank r // b, with b = `CacheSizes.bank_rows`.
    """

    pools: tuple[LayerCache, ...]
    banks: tuple[Bank, ...]

    def layer(self, layer: int, bank: int) -> LayerCache:
        """One layer as the rows of a bank have it."""
        blocks, rows = self.pools[layer], self.banks[bank].layers[layer]
        groups = map(together, blocks.groups, rows.groups)
        return LayerCache(tuple(groups), blocks.host, rows.stats)

    def with_layer(self, layer: int, bank: int, made: LayerCache) -> Cache:
        """With what `layer` gave, changed."""
        mine = self.banks[bank]
        mine = dataclasses.replace(mine, layers=replaced(mine.layers, layer, _rows_of(made)))
        return Cache(replaced(self.pools, layer, _pools_of(made)), replaced(self.banks, bank, mine))

    def with_standing(self, bank: int, standing: Standing) -> Cache:
        """With the rows of a bank standing elsewhere."""
        mine = dataclasses.replace(self.banks[bank], standing=standing)
        return dataclasses.replace(self, banks=replaced(self.banks, bank, mine))


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
    rows = layout.of_rows(layout.sizes.bank_rows)
    pools, banks = [], [[] for _ in range(layout.sizes.banks)]
    for layer in range(len(layout.groups)):
        # Of the first bank the pools are kept; those of a layer of one block are soon gone.
        made = platform.put(_on_device(rows, policy, layer))
        pools.append(_pools_of(dataclasses.replace(made, host=_host(layout, layer, empty_host))))
        banks[0].append(_rows_of(made))
        few = dataclasses.replace(rows, sizes=dataclasses.replace(rows.sizes, blocks=1))
        for bank in banks[1:]:
            bank.append(_rows_of(platform.put(_on_device(few, policy, layer))))
    return Cache(tuple(pools), tuple(Bank(tuple(layers), nowhere(rows.sizes)) for layers in banks))


def nowhere(sizes: CacheSizes) -> Standing:
    """Rows of which none is in use."""
    rows = (sizes.batch,)
    return Standing(
        block_table=zeros((sizes.batch, sizes.pages), "int32"),
        lengths=zeros(rows, "int32"),
        settled=zeros(rows, "int32"),
        chunks=zeros(rows, "int32"),
    )


def reset_row(standing: Standing, row: jax.Array, blocks: jax.Array, length: jax.Array) -> Standing:
    """Row `row` holds `length` tokens in `blocks`, int32[P]."""
    return Standing(
        block_table=standing.block_table.at[row].set(blocks),
        lengths=standing.lengths.at[row].set(length),
        settled=standing.settled.at[row].set(length),
        chunks=standing.chunks.at[row].set(0),
    )


@functools.lru_cache(maxsize=8)
def abstract(layout: CacheLayout, policy: Policy) -> Cache:
    """What `init` makes, as `jax.ShapeDtypeStruct`s that lie in the memory of their tier."""
    # Kept, since it takes 50 ms and every call of `generate` asks for it several times.
    rows = layout.of_rows(layout.sizes.bank_rows)
    known: dict[Any, LayerCache] = {}
    layers = []
    for layer, groups in enumerate(layout.groups):
        alike = tuple((without_heads(group), len(group.heads)) for group in groups)
        if alike not in known:
            made = jax.eval_shape(functools.partial(_on_device, rows, policy, layer))
            host = platform.placed(_host(layout, layer, abstract_host), "pinned_host")
            known[alike] = dataclasses.replace(platform.placed(made), host=host)
        layers.append(known[alike])
    standing = platform.placed(jax.eval_shape(functools.partial(nowhere, rows.sizes)))
    bank = Bank(tuple(map(_rows_of, layers)), standing)
    return Cache(tuple(map(_pools_of, layers)), (bank,) * layout.sizes.banks)


def _pools_of(layer: LayerCache) -> LayerCache:
    return LayerCache(tuple(map(by_block, layer.groups)), layer.host, ())


def _rows_of(layer: LayerCache) -> LayerCache:
    return LayerCache(tuple(map(by_row, layer.groups)), (), layer.stats)


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


class AllRows(NamedTuple):
    """A cache as if all rows were one bank; of the rows see `Standing`."""

    layers: tuple[LayerCache, ...]
    block_table: jax.Array
    lengths: jax.Array
    settled: jax.Array
    chunks: jax.Array


def all_rows(cache: Cache) -> AllRows:
    """All rows' arrays together, copied where there are several banks: to look at."""
    layers = []
    for layer, pools in enumerate(cache.pools):
        rows = side_by_side([bank.layers[layer] for bank in cache.banks])
        groups = tuple(map(together, pools.groups, rows.groups))
        layers.append(LayerCache(groups, pools.host, rows.stats))
    return AllRows(tuple(layers), *side_by_side([bank.standing for bank in cache.banks]))
