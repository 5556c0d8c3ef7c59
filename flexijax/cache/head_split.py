"""Which KV heads each shard gets, so that all hold equally many of every kind over all layers.

Padded in each layer, Llama 3.1's 64 unstable heads would take 1.2, 1.75 and 3.1 times their bytes
on 2, 4 and 8 shards. So a layer's heads are dealt out: each shard gets the whole part of a group's
heads divided by the shards, and one more is given to those that have got the fewest more so far.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

# Of one layer: the KV heads of each head group.
Groups = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class LayerSplit:
    """One layer over S shards.

    heads: of each shard, its KV heads of the model, group after group. counts: of each shard, how
    many of them belong to each group.
    """

    heads: tuple[tuple[int, ...], ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def even(self) -> bool:
        """Whether every shard has as many of each group."""
        return len(set(self.counts)) == 1

    def most(self, group: int) -> int:
        """Heads of a group on the shard that has the most of them."""
        return max(counts[group] for counts in self.counts)

    def fewest(self, group: int) -> int:
        """Heads of a group on the shard that has the fewest."""
        return min(counts[group] for counts in self.counts)


def split_heads(layers: Sequence[Groups], shards: int) -> tuple[LayerSplit, ...]:
    """The heads of each shard in each layer.

    Every shard gets equally many heads of each layer. Of the first group of a layer that does not
    go into shards evenly some get one more than others, and of the second one less: over all layers
    at most one more than any other shard, none where their number is a multiple of the shards.

        [[0, 2], [1, 3]] and [[0], [1, 2, 3]] on 2: (0, 1), (2, 3) and (0, 1), (2, 3)

    Raises ValueError, with the reason, where the layers' heads are no multiple of the shards, or a
    layer has more than two groups that do not go into shards evenly.
    """
    further = [0] * shards  # heads beyond the whole part, of the first group
    found = []
    for layer, groups in enumerate(layers):
        heads = sum(map(len, groups))
        if heads % shards:
            raise ValueError(
                f"layer {layer} has {heads} KV heads, which {shards} shards cannot have equally "
                "many of: use a number of devices that divides them"
            )
        sizes = [len(group) for group in groups]
        if all(size % shards == 0 for size in sizes):
            counts = [[size // shards for size in sizes]] * shards
        elif len(groups) == 2:
            whole, rest = divmod(sizes[0], shards)
            more = sorted(range(shards), key=further.__getitem__)[:rest]
            first = [whole + (shard in more) for shard in range(shards)]
            counts = [[count, heads // shards - count] for count in first]
            for shard in more:
                further[shard] += 1
        else:
            raise ValueError(
                f"the policy keeps the KV heads of layer {layer} in {len(groups)} groups of "
                f"{sizes}, which {shards} shards cannot have equally many of: at most two groups "
                "may be divided unevenly"
            )
        found.append(_dealt(groups, counts))
    return tuple(found)


def _dealt(groups: Groups, counts: Sequence[Sequence[int]]) -> LayerSplit:
    """The groups' heads in order, so many of each to each shard."""
    left = [list(group) for group in groups]
    heads = []
    for wanted in counts:
        mine: list[int] = []
        for group, count in zip(left, wanted, strict=True):
            mine += group[:count]
            del group[:count]
        heads.append(tuple(mine))
    return LayerSplit(tuple(heads), tuple(map(tuple, counts)))
