"""Head groups and their ladders, what each method asks for, and finding a method by its name."""

import dataclasses

import pytest

from flexijax import policies
from flexijax.models.config import AttentionShape
from flexijax.policies.a2sf import A2SF
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.base import HOST, HeadGroup, RunSpec, Tier, check_groups
from flexijax.policies.compresskv import CompressKV
from flexijax.policies.flexi import Flexi
from flexijax.policies.h2o import H2O
from flexijax.policies.kvcrush import KVCrush
from flexijax.policies.lacache import LaCache
from flexijax.policies.lazy_eviction import LazyEviction
from flexijax.policies.minmax import MinMax
from flexijax.policies.morphkv import MorphKV
from flexijax.policies.quest import Quest
from flexijax.policies.razor_attention import RazorAttention
from flexijax.policies.sketch import Sketch
from flexijax.policies.snapkv import SnapKV
from flexijax.policies.streaming_llm import StreamingLLM
from flexijax.policies.treekv import TreeKV
from flexijax.profiles.head_profile import HeadProfile

DROPPING = (
    *("a2sf", "compresskv", "h2o", "kvcrush", "lacache", "lazy_eviction", "morphkv"),
    *("razor_attention", "snapkv", "streaming_llm", "treekv"),
)
NAMES = tuple(sorted((*DROPPING, "flexi", "full", "index_cache", "quest")))
ALL, HOSTED = Tier(None), Tier(None, HOST)
PROFILE = HeadProfile(
    model="made by hand",
    num_layers=3,
    num_kv_heads=4,
    unstable=((0, 1), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)),
    page_size=16,
    budget_pages=4,
    source="this test",
)
RUN = RunSpec(
    shape=AttentionShape(num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16, scale=0.25),
    page_size=16,
    budget_tokens=96,
    max_tokens=512,
    max_new_tokens=64,
    chunk_steps=16,
    adaptive=None,
    profile=PROFILE,
)


def group(*ladder, **fields):
    return HeadGroup((0, 2), ladder, **fields)


@pytest.mark.parametrize(
    ("kind", "room", "made"),
    [
        ("dense", None, lambda: group(ALL)),
        ("selected", None, lambda: group(ALL, attends=4, score=Sketch(2))),
        ("offloaded", 4, lambda: group(Tier(4), HOSTED, score=MinMax())),
        ("offloaded", 4, lambda: group(Tier(4), HOSTED, score=Sketch(2), schedule=Adaptive())),
        ("evicting", 96, lambda: group(Tier(96), unit="token")),
        ("evicting", 160, lambda: group(Tier(160), unit="token", prompt_room=96)),
    ],
)
def test_every_legal_ladder(kind, room, made):
    assert (made().kind, made().room) == (kind, room)
    assert made() == made()
    assert hash(made()) == hash(made())


@pytest.mark.parametrize(
    "ladder",
    [
        {"ladder": (HOSTED,)},
        {"ladder": (ALL, HOSTED)},
        {"ladder": (Tier(4), Tier(8, HOST))},
        {"ladder": (Tier(4), Tier(8), HOSTED)},
        {"ladder": (HOSTED, ALL)},
        {"ladder": (Tier(4),)},
        {"ladder": (Tier(4), ALL)},
        {"ladder": (Tier(4), HOSTED), "attends": 2},
        {"ladder": (Tier(4), HOSTED), "unit": "token"},
        {"ladder": (ALL,), "unit": "token"},
        {"ladder": (Tier(4),), "unit": "token", "attends": 2},
        {"ladder": (ALL,), "unit": "block"},
    ],
    ids=str,
)
def test_a_ladder_that_the_cache_has_not(ladder):
    with pytest.raises(ValueError, match="no ladder that the cache has: pages all on the device"):
        HeadGroup((0,), score=Sketch(2), **ladder)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"heads": (1, 1)}, r"heads=\(1, 1\) of a group must ascend from 0, each named once"),
        ({"heads": (2, 1)}, r"heads=\(2, 1\) of a group must ascend from 0, each named once"),
        ({"ladder": ()}, r"ladder=\(\) of a head group needs at least one tier"),
        ({"attends": 0, "score": MinMax()}, "attends=0 of a head group must be at least 1"),
        ({"ladder": (Tier(0),), "unit": "token"}, "room=0 of a tier must be at least 1"),
        (
            {"ladder": (Tier(4),), "unit": "token", "prompt_room": 0},
            "prompt_room=0 of a head group must be at least 1",
        ),
        (
            {"ladder": (Tier(4),), "unit": "token", "prompt_room": 5},
            "prompt_room=5 is more than room=4",
        ),
        ({"heads": (-1, 1)}, "must ascend from 0"),
        ({"score": MinMax()}, "score means nothing for a head group that is kept dense"),
        ({"prompt_room": 4}, "prompt_room means nothing for a head group that is kept dense"),
        ({"schedule": Adaptive()}, "schedule means nothing"),
        ({"attends": 4}, "whose pages are chosen needs a score"),
        ({"ladder": (Tier(4), HOSTED)}, "whose pages are chosen needs a score"),
    ],
)
def test_a_head_group_that_cannot_be(fields, says):
    legal = {"heads": (0, 1), "ladder": (ALL,)}
    HeadGroup(**legal)
    with pytest.raises(ValueError, match=says):
        HeadGroup(**(legal | fields))


def test_every_head_is_in_one_group():
    check_groups((HeadGroup((0, 2), (ALL,)), HeadGroup((1,), (ALL,))), num_kv_heads=3, layer=5)
    for heads in ([(0, 1)], [(0, 1), (1, 2)], [(0, 1, 2, 3)], []):
        groups = tuple(HeadGroup(some, (ALL,)) for some in heads)
        with pytest.raises(ValueError, match=r"layer 5 .* each of 0 .. 2 must be in one group"):
            check_groups(groups, num_kv_heads=3, layer=5)


def test_the_methods_are_found_by_their_files():
    assert policies.names() == NAMES
    for name in NAMES:
        assert policies.find(name).name == name
    with pytest.raises(ValueError, match="policy='nothing' must be one of") as caught:
        policies.find("nothing")
    assert all(repr(name) in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_a_value(name):
    policy = policies.find(name)
    assert policy == policies.find(name)
    assert hash(policy) == hash(policies.find(name))
    assert {policy: 1}[dataclasses.replace(policy)] == 1
    for field in dataclasses.fields(policy):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(policy, field.name, None)


def test_methods_differ_by_their_constants():
    assert StreamingLLM() == StreamingLLM(4) != StreamingLLM(5)
    assert SnapKV() == SnapKV(window=64, kernel=5) != SnapKV(window=32)
    assert H2O() == H2O(0.5) != H2O(0.25)
    assert Quest() == Quest(Sketch(2)) != Quest(MinMax()) != Quest(MinMax("int8"))
    assert Flexi() != Flexi(unstable=((), (), ()))


@pytest.mark.parametrize("name", NAMES)
def test_the_groups_of_a_method_hold_every_head(name):
    for layer in range(3):
        check_groups(policies.find(name).groups(layer, RUN), num_kv_heads=4, layer=layer)


def test_what_each_method_keeps():
    assert policies.find("full").groups(0, RUN) == (HeadGroup((0, 1, 2, 3), (ALL,)),)
    (selected,) = Quest(MinMax()).groups(0, RUN)
    assert (selected.kind, selected.attends, selected.score) == ("selected", 6, MinMax())
    for name in set(DROPPING) - {"snapkv", "compresskv", "razor_attention"}:
        (evicting,) = policies.find(name).groups(0, RUN)
        assert (evicting.kind, evicting.room, evicting.prompt_room) == ("evicting", 96, None)
    for growing in (SnapKV(), CompressKV()):
        (one,) = growing.groups(0, RUN)
        assert (one.kind, one.room, one.prompt_room) == ("evicting", 96 + 64, 96)


def test_what_each_method_observes():
    found = {
        name: (policies.find(name).prompt_window, policies.find(name).observes_decode)
        for name in NAMES
    }
    assert found == dict.fromkeys(NAMES, (0, False)) | {
        "snapkv": (64, False),
        "compresskv": (8, False),
        "lacache": (1, False),
        "morphkv": (32, True),
        "treekv": (64, True),
        "kvcrush": (8, True),
        **dict.fromkeys(("h2o", "a2sf", "lazy_eviction"), (None, True)),
    }
    assert SnapKV(window=7).prompt_window == MorphKV(window=7).prompt_window == 7


def test_flexi_splits_the_heads_by_the_profile():
    run = dataclasses.replace(RUN, adaptive=Adaptive())
    mixed = Flexi().groups(0, run)
    assert [(one.heads, one.kind) for one in mixed] == [((1, 3), "selected"), ((0, 2), "offloaded")]
    assert (mixed[0].attends, mixed[1].room) == (6, 6)
    assert [one.schedule for one in mixed] == [None, Adaptive()]
    assert {one.score for one in Flexi(MinMax()).groups(0, run)} == {MinMax()}
    for layer, kind in ((1, "selected"), (2, "offloaded")):
        (only,) = Flexi().groups(layer, run)
        assert (only.heads, only.kind) == ((0, 1, 2, 3), kind)


def test_flexi_with_named_heads_asks_for_no_profile():
    named = Flexi(unstable=((2,), (), (0, 1, 2, 3)))
    run = dataclasses.replace(RUN, profile=None)
    assert [[one.heads for one in named.groups(layer, run)] for layer in range(3)] == [
        [(2,), (0, 1, 3)],
        [(0, 1, 2, 3)],
        [(0, 1, 2, 3)],
    ]
    asking = {name: policies.find(name).needs_profile for name in NAMES}
    assert asking == dict.fromkeys(NAMES, False) | {"flexi": True, "razor_attention": True}
    assert not named.needs_profile
    with pytest.raises(ValueError, match="policy='flexi' needs a head profile"):
        Flexi().groups(0, run)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: MinMax("nonsense"), "dtype='nonsense' of MinMax must be None or one of 'float32'"),
        (lambda: Sketch(3), r"bits=3 of Sketch must be one of \(1, 2, 4\)"),
        (lambda: Sketch(2, 0), "fit_tokens=0 of Sketch must be at least 1, or None"),
        (lambda: StreamingLLM(-1), "sinks=-1 must be at least 0"),
        (lambda: SnapKV(window=0), "window=0 must be at least 1"),
        (lambda: SnapKV(kernel=4), "kernel=4 must be odd and positive"),
        (lambda: SnapKV(kernel=-1), "kernel=-1 must be odd and positive"),
        (lambda: H2O(recent=1.5), "recent=1.5 must be 0 to 1"),
        (lambda: H2O(recent=float("nan")), "recent=nan must be 0 to 1"),
        (lambda: SnapKV(window=96).groups(0, RUN), "budget_tokens=96 must be more than window=96"),
        (lambda: A2SF(forgetting=1.1), "forgetting=1.1 must be 0 to 1"),
        (lambda: A2SF(recent=-1), "recent=-1 must be at least 0"),
        (lambda: A2SF(recent=96).groups(0, RUN), "budget_tokens=96 must be more than recent=96"),
        (lambda: MorphKV(window=0), "window=0 must be at least 1"),
        (lambda: MorphKV(fuse="mean"), "fuse='mean' must be 'sum' or 'max'"),
        (lambda: MorphKV(96).groups(0, RUN), "budget_tokens=96 must be more than window=96"),
        (lambda: LazyEviction(threshold=1.0), "threshold=1.0 must be at least 0 and less than 1"),
        (lambda: LazyEviction(recent=-1), "recent=-1 must be at least 0"),
        (lambda: LazyEviction(recent=96).groups(0, RUN), "must be more than recent=96"),
        (lambda: TreeKV(sinks=-1), "sinks=-1 must be at least 0"),
        (lambda: TreeKV(window=0), "window=0 must be at least 1"),
        (lambda: TreeKV(sinks=48).groups(0, RUN), "must be more than twice sinks=48"),
        (lambda: KVCrush(page=0), "page=0 must be at least 1"),
        (lambda: KVCrush(sinks=8), "sinks=8 must be a multiple of page=16"),
        (lambda: KVCrush(recent=1.5), "recent=1.5 must be 0 to 1"),
        (lambda: KVCrush(recent=0.5).groups(0, RUN), "budget_tokens=96 of policy='kvcrush' must"),
        (lambda: LaCache(first=1.0), "first=1.0 must be at least 0 and less than 1"),
        (lambda: LaCache(rung=1), "rung=1 must be at least 2"),
        (lambda: LaCache(rung=4, margin=3), "margin=3 must be at least rung=4"),
        (lambda: LaCache(margin=48).groups(0, RUN), "budget_tokens=96 leaves 48 tokens behind"),
        (lambda: LaCache(margin=2).groups(0, RUN), "a margin of at least 3 layers"),
        (lambda: RazorAttention(share=0), "share=0 must be at least 1"),
        (lambda: RazorAttention(sinks=-1), "sinks=-1 must be at least 0"),
        (lambda: CompressKV(window=0), "window=0 must be at least 1"),
        (lambda: CompressKV(kernel=2), "kernel=2 must be odd and positive"),
        (lambda: CompressKV(heads=((0,), ())), "must name a query head in every layer"),
        (lambda: CompressKV(heads=((0,), (1, 2))), "must be as many in every layer"),
        (lambda: CompressKV(heads=((0,),)).groups(0, RUN), "are of 1 layers, the model has 3"),
        (
            lambda: CompressKV(heads=((8,),) * 3).groups(0, RUN),
            "of layer 0 must be 0 to 7",
        ),
        (lambda: CompressKV(rooms=(8, 9, 9)).groups(0, RUN), "room=8 of layer 0 must be more than"),
    ],
)
def test_a_constant_that_cannot_be(made, says):
    with pytest.raises(ValueError, match=says):
        made()
