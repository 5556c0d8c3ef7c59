"""What a cache is made of: of each layer its head groups, by block and by row."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from flexijax.cache.arrays import replaced
from flexijax.cache.banks import by_block, by_row, only, side_by_side, together
from flexijax.cache.evicting import EvictionStats
from flexijax.cache.offloaded import RerankStats
from flexijax.cache.over_mesh import heads_in
from flexijax.cache.tiers import AnyHost


@heads_in(groups=1, host=1, stats=1)
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer, a tuple of head groups; each group has its host tier and statistics, or None."""

    groups: tuple[Any, ...]  # DenseGroup, SelectedGroup, OffloadedGroup, EvictingGroup
    host: tuple[AnyHost | None, ...]
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
    Row r is row r % b of bank r // b, with b = `CacheSizes.bank_rows`. shared: what lies by block
    of all layers whose groups have places, see `spread.py`; None where there are none.
    """

    pools: tuple[LayerCache, ...]
    banks: tuple[Bank, ...]
    shared: LayerCache | None = None

    @property
    def all_pools(self) -> tuple[LayerCache, ...]:
        """What lies by block, each array once."""
        return self.pools if self.shared is None else (*self.pools, self.shared)

    def pool(self, layer: int) -> LayerCache:
        """What lies by block of one layer, shared with others or not."""
        mine = self.pools[layer]
        if self.shared is None or not has_places(mine):
            return mine
        return LayerCache(
            tuple(map(together, mine.groups, self.shared.groups)), self.shared.host, mine.stats
        )

    def layer(self, layer: int, bank: int) -> LayerCache:
        """One layer as the rows of a bank have it."""
        blocks, rows = self.pool(layer), self.banks[bank].layers[layer]
        groups = map(together, blocks.groups, rows.groups)
        return LayerCache(tuple(groups), blocks.host, rows.stats)

    def with_layer(self, layer: int, bank: int, made: LayerCache) -> Cache:
        """With what `layer` gave, changed."""
        mine = self.banks[bank]
        mine = dataclasses.replace(mine, layers=replaced(mine.layers, layer, rows_of(made)))
        shared = shared_of(made) if has_places(made) else self.shared
        pools = replaced(self.pools, layer, pools_of(made))
        return Cache(pools, replaced(self.banks, bank, mine), shared)

    def with_standing(self, bank: int, standing: Standing) -> Cache:
        """With the rows of a bank standing elsewhere."""
        mine = dataclasses.replace(self.banks[bank], standing=standing)
        return dataclasses.replace(self, banks=replaced(self.banks, bank, mine))


def has_places(layer: LayerCache) -> bool:
    """Whether the layer's groups have places, see `spread.py`; then all of them have."""
    return any(group.first is not None for group in layer.groups)


def pools_of(layer: LayerCache) -> LayerCache:
    """Of a layer what lies by block, and is not shared with other layers."""
    if has_places(layer):
        groups = (only(group, ("first",)) for group in layer.groups)
        return LayerCache(tuple(groups), (None,) * len(layer.groups), ())
    return LayerCache(tuple(map(by_block, layer.groups)), layer.host, ())


def shared_of(layer: LayerCache) -> LayerCache:
    """Of a layer whose groups have places what lies by block, of all such layers."""
    groups = (dataclasses.replace(by_block(group), first=None) for group in layer.groups)
    return LayerCache(tuple(groups), layer.host, ())


def rows_of(layer: LayerCache) -> LayerCache:
    """Of a layer what lies by row."""
    return LayerCache(tuple(map(by_row, layer.groups)), (), layer.stats)


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
    for layer in range(len(cache.pools)):
        pools = cache.pool(layer)
        rows = side_by_side([bank.layers[layer] for bank in cache.banks])
        groups = tuple(map(together, pools.groups, rows.groups))
        layers.append(LayerCache(groups, pools.host, rows.stats))
    return AllRows(tuple(layers), *side_by_side([bank.standing for bank in cache.banks]))
