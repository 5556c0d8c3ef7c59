"""From the layout of a model's cache to that of each shard of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flexijax.cache.head_split import LayerSplit, split_heads
from flexijax.cache.layout import CacheLayout, without_heads
from flexijax.policies.base import HeadGroup


def shard_layout(whole: CacheLayout, shards: int) -> CacheLayout:
    """What each of `shards` devices keeps: its own heads, numbered from 0, group after group.

    In a layer in which shards hold different numbers of a group's heads, groups have places.
    Raises ValueError, with the reason, where the heads cannot be divided so.
    """
    layers = [[group.heads for group in groups] for groups in whole.groups]
    splits = split_heads(layers, shards)
    uneven = [groups for groups, of in zip(whole.groups, splits, strict=True) if not of.even]
    if len({tuple(map(without_heads, groups)) for groups in uneven}) > 1:
        raise ValueError(
            f"the policy keeps the KV heads of some layers in groups of other kinds than those of "
            f"others, and not all of them can be divided evenly over {shards} devices of mesh"
        )
    # Of each group of an uneven layer, the places that a shard needs in all such layers.
    places = [
        max(sum(of.counts[shard][at] for of in splits if not of.even) for shard in range(shards))
        for at in range(2 if uneven else 0)
    ]
    shape = whole.sizes.shape
    shape = dataclasses.replace(
        shape,
        num_heads=shape.num_heads // shards,
        num_kv_heads=shape.num_kv_heads // shards,
    )
    return CacheLayout(
        dataclasses.replace(whole.sizes, shape=shape),
        tuple(
            tuple(
                _with_source(group, of_model, layer, splits)
                for group, of_model in zip(
                    _groups(groups, split, [0, 0] if split.even else places), groups, strict=True
                )
            )
            for layer, (groups, split) in enumerate(zip(whole.groups, splits, strict=True))
        ),
        splits,
    )


def _with_source(
    group: HeadGroup, of_model: HeadGroup, layer: int, splits: tuple[LayerSplit, ...]
) -> HeadGroup:
    """The group of a shard, whose source names heads of the shard too; of_model: of all heads.

    Raises ValueError where some of its heads take pages from a head of another shard.
    """
    if of_model.source is None:
        return group
    of, heads = of_model.source
    takes, found = dict(zip(of_model.heads, heads, strict=True)), set()
    if splits[layer].even and splits[of].even:
        for mine, theirs in zip(splits[layer].heads, splits[of].heads, strict=True):
            wanted = [takes[mine[head]] for head in group.heads]
            found.add(tuple(map(theirs.index, wanted)) if set(wanted) <= set(theirs) else None)
    if len(found) != 1 or None in found:
        raise ValueError(
            f"heads of layer {layer} attend to pages that heads of layer {of} choose, and "
            f"{len(splits[of].heads)} devices of mesh do not all have both: leave mesh out"
        )
    return dataclasses.replace(group, source=(of, *found))


def _groups(
    groups: tuple[HeadGroup, ...], split: LayerSplit, places: list[int]
) -> tuple[HeadGroup, ...]:
    """A layer's groups with the heads of a shard, as each shard has them."""
    if split.even:
        [counts, *_] = split.counts
        ends = [sum(counts[: at + 1]) for at in range(len(counts))]
        return tuple(
            dataclasses.replace(group, heads=tuple(range(end - count, end)))
            for group, count, end in zip(groups, counts, ends, strict=True)
        )
    first, second = groups
    heads = len(split.heads[0])
    return (
        dataclasses.replace(first, heads=tuple(range(split.most(0))), places=places[0]),
        dataclasses.replace(second, heads=tuple(range(split.fewest(0), heads)), places=places[1]),
    )


def places_of(
    layout: CacheLayout, layer: int, at: int, row: int
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Of a layer's group `at`: (head of the model, its place in arrays [B, K] of a row), each head.

    Over a mesh the arrays are those of all devices side by side.
    """
    heads = layout.groups[layer][at].heads
    if layout.splits is None:
        yield from ((head, (row, index)) for index, head in enumerate(heads))
        return
    split, places = layout.splits[layer], layout.groups[layer][at].places
    for shard, (mine, counts) in enumerate(zip(split.heads, split.counts, strict=True)):
        begins = sum(counts[:at])
        for index, head in enumerate(heads):
            if not begins <= head < begins + counts[at]:
                continue
            if places:  # a row of one head each
                yield mine[head], (row * len(heads) + index, shard)
            else:
                yield mine[head], (row, shard * len(heads) + index)
