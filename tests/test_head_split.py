"""How KV heads are dealt out to shards, against all ways of doing it."""

import itertools
from collections import Counter

import numpy as np
import pytest

from flexijax import profiles
from flexijax.cache.head_split import split_heads

pytestmark = pytest.mark.any_jax

PUBLISHED = tuple(name for name in profiles.names() if not name.startswith("smollm2"))


def groups_of(profile):
    """Of each layer its unstable and its stable heads, as a policy groups them."""
    for layer in range(profile.num_layers):
        both = (profile.unstable_heads(layer), profile.stable_heads(layer))
        yield [group for group in both if group]


def unstable_of(profile, splits, shards):
    """Of each shard, how many of its heads are unstable, over all layers."""
    return [
        sum(
            (layer, head) in profile.unstable
            for layer, split in enumerate(splits)
            for head in split.heads[shard]
        )
        for shard in range(shards)
    ]


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shard_has_as_many_unstable_heads_of_a_published_profile(name, shards):
    profile = profiles.load(name)
    splits = split_heads(list(groups_of(profile)), shards)
    counts = unstable_of(profile, splits, shards)
    assert counts == [len(profile.unstable) // shards] * shards
    assert sum(counts) == len(profile.unstable)


def test_smollm2_on_three_devices():
    """22 unstable heads: a shard has 8 and two have 7, where no other split has less at most."""
    profile = profiles.load("smollm2-135m")
    counts = unstable_of(profile, split_heads(list(groups_of(profile)), 3), 3)
    assert sorted(counts) == [7, 7, 8]


@pytest.mark.parametrize("seed", range(30))
def test_heads_are_dealt_out_whole_and_evenly(seed):
    rng = np.random.default_rng(seed)
    shards = int(rng.integers(1, 5))
    heads = shards * int(rng.integers(1, 4))
    layers = []
    for _ in range(int(rng.integers(1, 9))):
        order = rng.permutation(heads).tolist()
        cut = int(rng.integers(0, heads + 1))
        layers.append([sorted(part) for part in (order[:cut], order[cut:]) if part])
    for groups, split in zip(layers, split_heads(layers, shards), strict=True):
        assert sorted(itertools.chain(*split.heads)) == list(range(heads))
        for mine, counts in zip(split.heads, split.counts, strict=True):
            # Group after group, and as many of each as it says.
            of_group = [next(at for at, of in enumerate(groups) if head in of) for head in mine]
            assert of_group == sorted(of_group) and len(mine) == heads // shards
            assert [Counter(of_group)[at] for at in range(len(groups))] == list(counts)
        assert all(split.most(at) - split.fewest(at) <= 1 for at in range(len(groups)))


def best_by_all_ways(unstable, heads, shards):
    """The least that the fullest shard can hold, by trying everything."""
    each = heads // shards
    ways = []
    for count in unstable:
        of_layer = itertools.product(range(min(each, count) + 1), repeat=shards)
        ways.append([way for way in of_layer if sum(way) == count])
    return min(max(map(sum, zip(*chosen, strict=True))) for chosen in itertools.product(*ways))


@pytest.mark.parametrize(
    ("unstable", "heads", "shards"),
    [((1, 1, 1), 4, 2), ((3, 1, 2, 1), 4, 2), ((1, 2, 2, 1), 3, 3), ((1, 0, 5, 2), 6, 3)],
)
def test_no_split_has_less_on_its_fullest_shard(unstable, heads, shards):
    layers = [[part for part in (range(count), range(count, heads)) if part] for count in unstable]
    splits = split_heads(layers, shards)
    held = [
        sum(
            head < count
            for count, split in zip(unstable, splits, strict=True)
            for head in split.heads[shard]
        )
        for shard in range(shards)
    ]
    assert max(held) == best_by_all_ways(unstable, heads, shards)


def test_a_split_by_hand():
    splits = split_heads([[[0, 2], [1, 3]], [[0], [1, 2, 3]], [[3], [0, 1, 2]]], 2)
    assert [split.heads for split in splits] == [
        ((0, 1), (2, 3)),
        ((0, 1), (2, 3)),
        ((0, 1), (3, 2)),
    ]
    assert [split.even for split in splits] == [True, False, False]


def test_what_cannot_be_split_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="3 KV heads, which 2 shards cannot have equally many"):
        split_heads([[[0], [1, 2]]], 2)
    with pytest.raises(ValueError, match=r"3 groups of \[1, 1, 2\].*at most two groups"):
        split_heads([[[0], [1], [2, 3]]], 2)
