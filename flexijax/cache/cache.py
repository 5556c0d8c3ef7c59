"""Both tiers of a batch of requests: pools of blocks and banks of rows, updated in place."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax

from flexijax.cache import spread
from flexijax.cache.arrays import zeros
from flexijax.cache.kinds import kind_of
from flexijax.cache.layout import CacheLayout, CacheSizes, GroupProgram, without_heads
from flexijax.cache.over_mesh import made as made_of_each
from flexijax.cache.parts import AllRows as AllRows
from flexijax.cache.parts import Bank as Bank
from flexijax.cache.parts import Cache as Cache
from flexijax.cache.parts import LayerCache as LayerCache
from flexijax.cache.parts import Standing as Standing
from flexijax.cache.parts import all_rows as all_rows
from flexijax.cache.parts import has_places, pools_of, rows_of, shared_of
from flexijax.cache.tiers import AnyHost, abstract_host, empty_host
from flexijax.pallas_kernels import placing, platform
from flexijax.policies.base import HOST, HeadGroup, Policy
from flexijax.policies.codec import Codec


def kind(group: HeadGroup) -> ModuleType:
    """The functions over groups of that kind.

    empty, store, after_step, commit, end_chunk; of the last: has_chunk_end, num_queries. Of kinds
    whose pages all lie by block, and may be shared: read_pages.
    """
    return spread if group.places else kind_of(group)


def keeps_all_by_block(layout: CacheLayout) -> bool:
    """Whether every page of a request can be read by its block id, so that blocks can be shared.

    Coded pages cannot: a prompt reads its own pages as they were computed, and one that began with
    another's would read what their codes stand for, and get other tokens.
    """
    return all(
        group.codec is None and hasattr(kind_of(group), "read_pages")
        for *_, group in layout.all_groups()
    )


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
    if placing.current_mesh() is not None:
        return _over_mesh(layout, policy)
    rows = layout.of_rows(layout.sizes.bank_rows)
    pools, banks = [], [[] for _ in range(layout.sizes.banks)]
    for layer in range(len(layout.groups)):
        # Of the first bank the pools are kept; those of a layer of one block are soon gone.
        made = platform.put(_on_device(rows, policy, layer))
        pools.append(pools_of(dataclasses.replace(made, host=_host(layout, layer, empty_host))))
        banks[0].append(rows_of(made))
        few = dataclasses.replace(rows, sizes=dataclasses.replace(rows.sizes, blocks=1))
        for bank in banks[1:]:
            bank.append(rows_of(platform.put(_on_device(few, policy, layer))))
    return Cache(tuple(pools), tuple(Bank(tuple(layers), nowhere(rows.sizes)) for layers in banks))


def _over_mesh(layout: CacheLayout, policy: Policy) -> Cache:
    """`init` of each shard, in one program, with a host tier local to each device."""
    cache, first_blocks = made_of_each(_arrays, layout, policy), spread.firsts(layout)
    pools, shared = [], cache.shared
    for layer, pool in enumerate(cache.pools):
        host = _host(layout, layer, empty_host) if not has_places(pool) else pool.host
        if shared is not None and has_places(pool) and not shared.host:
            shared = dataclasses.replace(shared, host=_host(layout, layer, empty_host))
        groups = tuple(
            group if first is None else dataclasses.replace(group, first=placing.cut(first, 1))
            for group, first in zip(pool.groups, first_blocks[layer], strict=True)
        )
        pools.append(LayerCache(groups, host, ()))
    sizes = layout.of_rows(layout.sizes.bank_rows).sizes
    banks = (dataclasses.replace(bank, standing=nowhere(sizes)) for bank in cache.banks)
    return Cache(tuple(pools), tuple(banks), shared)


def _arrays(layout: CacheLayout, policy: Policy) -> Cache:
    """All that a shard has in device memory; nothing of where rows stand."""
    nowhere_yet: Any = ()
    rows = layout.of_rows(layout.sizes.bank_rows)
    layers = [_on_device(rows, policy, layer) for layer in range(len(layout.groups))]
    banks = []
    for _ in range(layout.sizes.banks):
        mine = [_on_device(rows, policy, layer) for layer in range(len(layout.groups))]
        banks.append(Bank(tuple(map(rows_of, mine)), nowhere_yet))
    shared = next((shared_of(layer) for layer in layers if has_places(layer)), None)
    return Cache(tuple(map(pools_of, layers)), tuple(banks), shared)


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
    """What `init` makes, as `jax.ShapeDtypeStruct`s that lie in the memory of their tier.

    Of one shard where the layout is of one: see `over_mesh.placed`.
    """
    # Kept, since it takes 50 ms and every call of `generate` asks for it several times.
    with placing.over(None):
        return _abstract(layout, policy)


def _abstract(layout: CacheLayout, policy: Policy) -> Cache:
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
    bank = Bank(tuple(map(rows_of, layers)), standing)
    shared = next((shared_of(layer) for layer in layers if has_places(layer)), None)
    return Cache(tuple(map(pools_of, layers)), (bank,) * layout.sizes.banks, shared)


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
    layout: CacheLayout, layer: int, make: Callable[[CacheSizes, int, Codec | None], AnyHost]
) -> tuple[AnyHost | None, ...]:
    """One layer's host tier: None for groups that have none."""
    hosts: list[AnyHost | None] = []
    for group in layout.groups[layer]:
        if group.ladder[-1].memory != HOST:
            hosts.append(None)
        elif group.places:
            blocks = layout.sizes.blocks * group.places
            hosts.append(make(dataclasses.replace(layout.sizes, blocks=blocks), 1, None))
        else:
            hosts.append(make(layout.sizes, len(group.heads), group.ladder[-1].codec))
    return tuple(hosts)
