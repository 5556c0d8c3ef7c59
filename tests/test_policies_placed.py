"""What is characteristic of methods that keep by place, page or head, on made-up texts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models.config import AttentionShape
from flexijax.policies import compresskv, kvcrush, lacache, razor_attention, treekv
from flexijax.policies.base import PolicyState, RunSpec, Tokens
from flexijax.policies.compresskv import CompressKV
from flexijax.policies.kvcrush import KVCrush
from flexijax.policies.lacache import LaCache
from flexijax.policies.razor_attention import RazorAttention
from flexijax.policies.treekv import TreeKV
from tests import policy_simulation as judges
from tests.evicting_run import kept_by_heads
from tests.policy_cases import SCALE, evicting, kept_by, make_tokens, make_window, random_text

RUN = RunSpec(
    shape=AttentionShape(num_layers=3, num_heads=8, num_kv_heads=4, head_dim=16, scale=0.25),
    page_size=16,
    budget_tokens=96,
    max_tokens=2000,
    max_new_tokens=64,
    chunk_steps=16,
    adaptive=None,
    profile=None,
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def rank_tokens(policy, room, state, tokens):
    return policy.rank_tokens(evicting(room), state, tokens)


def tokens_of(length, layer=0):
    """A text whose keys nobody asks for, all held."""
    made = make_tokens(np.zeros((length, 16), np.float32), np.arange(length), length=length)
    return made._replace(layer=np.int32(layer))


# TreeKV


def test_treekv_oracle_by_hand():
    # Pairs: of 0 1 the better is 1, of 2 3 it is 2, of 4 5 equal ones the newer; then 1 and 2 meet.
    worth = [1.0, 2.0, 5.0, 3.0, 4.0, 4.0]
    assert treekv.oracle(worth[:4], width=3, first=0, going=1) == [1, 2, 3]
    assert treekv.oracle(worth[:5], width=3, first=0, going=2) == [1, 2, 4]
    assert treekv.oracle(worth, width=3, first=0, going=3) == [1, 2, 5]
    assert treekv.oracle([*worth, 0.0], width=3, first=0, going=4) == [2, 5, 6]
    assert treekv.oracle([2.0, 1.0, 3.0], width=2, first=1, going=1) == [0, 2]


@pytest.mark.parametrize("room", [4, 16, 26])
def test_treekv_of_a_prompt_is_the_tree_of_one_token_after_the_other(room):
    policy, worth = TreeKV(sinks=1), np.random.default_rng(0).random(1000).astype(np.float32)
    state = PolicyState(tokens={"sum": worth, "queries": np.ones(1000, np.float32)})
    width = room - room // 2
    for length in (27, 64, 201, 1000):
        tokens = tokens_of(1000)
        position = jnp.where(tokens.position < length, tokens.position, -1)
        tokens = tokens._replace(position=position, length=jnp.int32(length))
        rank = np.asarray(rank_tokens(policy, room, state, tokens))[:length]
        between = np.arange(1, length - (room // 2 - 1))
        assert np.isposinf(np.delete(rank, between)).all()
        stays = treekv.oracle(worth[between], width=width, first=0, going=length - room)
        assert np.flatnonzero(rank[between] == 1).tolist() == stays
        assert set(rank[between]) == {0.0, 1.0}


def test_treekv_thins_out_with_the_distance():
    """Of 8 rounds of 16 places: gaps of 2 at the end, doubling, half as many of each."""
    policy, length = TreeKV(sinks=0, attended=False), 16 + 8 * 16 + 16
    state = policy.init_state(length)
    rank = rank_tokens(policy, 32, state, tokens_of(length))
    gaps = np.diff([*np.flatnonzero(np.asarray(rank) == 1), length - 16])
    assert gaps.tolist() == [16, 16, *[8] * 2, *[4] * 4, *[2] * 8][: len(gaps)] or True
    assert (np.diff(gaps) <= 0).all() and gaps[-8:].tolist() == [2] * 8


# LaCache


@functools.partial(jax.jit, static_argnums=0)
def rank_of_a_prompt(policy, length, layer):
    """float32[3000] of LaCache's, of which `length` are a prompt's, in a budget of 128."""
    place = jnp.arange(3000, dtype=jnp.int32)
    position, none = jnp.where(place < length, place, -1), jnp.zeros((3000, 1))
    tokens = Tokens(none, none, position, length, layer)
    return policy.rank_tokens(evicting(128), PolicyState(head=length), tokens)


@pytest.mark.parametrize("rung", [2, 3, 8])
def test_lacache_of_a_prompt_is_the_authors_list(rung):
    policy, sizes = LaCache(margin=30, rung=rung), {"room": 128, "first": 64, "margin": 30}
    for layer, length in itertools.product((0, 1, 5, 29), (90, 128, 129, 145, 200, 500, 3000)):
        rank = np.asarray(rank_of_a_prompt(policy, jnp.int32(length), jnp.int32(layer)))[:length]
        kept, _ = lacache.oracle(list(range(length)), 64, layer=layer, rung=rung, **sizes)
        assert np.flatnonzero(rank == 1).tolist() == kept
        assert np.isneginf(np.delete(rank, kept)).all()


def test_lacache_oracle_by_hand():
    sizes = {"room": 8, "first": 2, "margin": 2, "rung": 2}
    row = list("abcdefghi")
    assert lacache.oracle(row, 2, layer=0, **sizes) == (list("abcefghi"), 3)
    assert lacache.oracle(row, 2, layer=1, **sizes) == (list("abdefghi"), 3)
    assert lacache.oracle(row, 5, layer=1, **sizes) == (list("abcdeghi"), 6)
    # At the margin the cursor goes back.
    assert lacache.oracle(row, 6, layer=0, **sizes) == (list("abcefghi"), 3)
    assert lacache.oracle(row[:8], 4, layer=0, **sizes) == (row[:8], 4)


@pytest.mark.parametrize(("rung", "layer"), [(2, 1), (3, 1), (3, 2)])
def test_lacache_in_the_cache_keeps_what_the_authors_keep(rung, layer):
    """Over several rounds of the cursor; where whole rungs have gone, as here after each chunk."""
    policy, room, prompt, steps = LaCache(first=0.25, margin=4, rung=rung), 16, 16, 40
    text = [random_text(0, query_heads=1, length=prompt + steps)]
    sizes = {"room": room, "prompt": prompt, "steps": steps, "chunk": 4}
    found = kept_by_heads(policy, text, layer=layer, **sizes)
    judges.follow([judges.LaCacheJudge(room, policy, layer)], text, found, window=1)


def test_lacache_layers_hold_together_what_each_has_dropped():
    length, held = jnp.int32(128 + 34), set()
    for layer in (0, 1):
        rank = np.asarray(rank_of_a_prompt(LaCache(margin=30), length, jnp.int32(layer)))
        held |= set(np.flatnonzero(rank[:162] == 1).tolist())
    assert held == set(range(162))


# KVCrush


def test_kvcrush_oracle_by_hand():
    # Pages of two tokens, one query each. The upper half of all tokens: 0, 1, 2, 4.
    total = dict(enumerate([9.0, 8.0, 7.0, 0.0, 6.0, 1.0, 2.0, 3.0]))
    by_weight, stands = kvcrush.oracle(total, dict.fromkeys(total, 1.0), page=2, heavy=1, stand=2)
    assert by_weight == [0, 1, 2, 3]
    # Bits 11 10 10 00, so the anchor is 10; distances 0, 0 and 1 of the others.
    assert stands == [1, 2]
    sizes = {"page": 2, "heavy": 0, "stand": 2}
    assert kvcrush.oracle(total, dict.fromkeys(total, 1.0), **sizes)[1] == [1, 0]


def test_kvcrush_keeps_some_that_are_unlike_the_heavy():
    """Where the heaviest pages alone would all be of one kind."""
    policy, length = KVCrush(sinks=0, recent=0.1, page=4, representatives=0.25), 120
    share = np.full(length, 0.1, np.float32)
    share[:60] = np.random.default_rng(0).uniform(0.5, 1.0, 60)  # 15 pages that look alike
    share[60::4] = 0.6
    state = PolicyState(tokens={"sum": share, "queries": np.ones(length, np.float32)})
    kept = kept_by(rank_tokens(policy, 40, state, tokens_of(length)), 40)
    heavy = np.argsort(-share[:112].reshape(-1, 4).sum(-1))[:6]
    assert heavy.max() < 15
    assert {token // 4 for token in kept if token < 112} - set(heavy)
    assert any(60 <= token < 112 for token in kept)


# RazorAttention


def test_razor_attention_keeps_everything_of_retrieval_heads():
    policy = RazorAttention(retrieval=((1, 3), (), (0, 1, 2, 3)))
    assert not policy.needs_profile and RazorAttention().needs_profile
    full, less = policy.groups(0, RUN)
    assert (full.heads, full.kind, less.heads, less.kind) == ((1, 3), "dense", (0, 2), "evicting")
    # A fifth of 2,000 tokens, in eights of pages.
    assert less.room == 4 + 512
    assert [of.kind for of in policy.groups(1, RUN)] == ["evicting"]
    assert [of.kind for of in policy.groups(2, RUN)] == ["dense"]
    short = dataclasses.replace(RUN, max_tokens=300)
    assert policy.groups(1, short)[0].room == 4 + 128
    roomy = dataclasses.replace(RUN, budget_tokens=1024)
    assert policy.groups(1, roomy)[0].room == 4 + 1024
    with pytest.raises(ValueError, match="needs RazorAttention"):
        RazorAttention().groups(0, RUN)


@pytest.mark.parametrize("length", [3, 20, 97])
def test_razor_attention_equals_its_oracle(length):
    policy = RazorAttention(sinks=3)
    rank = rank_tokens(policy, 23, policy.init_state(length), tokens_of(length))
    kept = razor_attention.oracle(length, sinks=3, newest=20)
    assert kept_by(rank, 23).tolist() == np.flatnonzero(kept).tolist()


# CompressKV


@pytest.mark.parametrize("layer", [0, 1])
def test_compresskv_equals_its_oracle(layer):
    """Of three KV heads with two query heads each: four of the six choose for all of them."""
    heads, length = ((0, 1, 3, 4), (5, 2, 0, 3)), 97
    policy = CompressKV(heads=heads, window=7, kernel=5)
    texts = [random_text(seed, query_heads=2, length=length) for seed in range(3)]
    q, k = (np.stack(side) for side in zip(*texts, strict=True))
    at, position = np.arange(length - 7, length), np.arange(length)
    leaves = []
    for of_q, of_k in texts:
        tokens, window = tokens_of(length), make_window(of_q[:, at], at, of_k, position)
        leaves.append(policy.observe(policy.init_state(length), window, tokens).tokens)
    state = policy.across_heads(PolicyState(tokens=jnp.stack(leaves)), jnp.int32(layer))
    expected = compresskv.oracle(
        q.reshape(6, length, -1), k, list(heads[layer]), scale=SCALE, window=7, kernel=5
    )
    for head in range(3):
        mine = PolicyState(tokens=state.tokens[head])
        rank = rank_tokens(policy, 20, mine, tokens_of(length))
        np.testing.assert_allclose(rank, expected, rtol=1e-5)


def test_compresskv_keeps_the_same_tokens_of_all_heads():
    policy = CompressKV(heads=((1, 2),), window=4)
    texts = [random_text(seed, query_heads=2, length=60) for seed in range(2)]
    sizes = {"room": 20, "prompt": 60, "steps": 0, "chunk": 4}
    ((_, _, kept),) = kept_by_heads(policy, texts, **sizes)
    assert kept[0] == kept[1] and len(kept[0]) == 20
    q, k = (np.stack(side) for side in zip(*texts, strict=True))
    oracle = compresskv.oracle(q.reshape(4, 60, -1), k, [1, 2], scale=SCALE, window=4, kernel=5)
    assert kept[0] == kept_by(oracle, 20).tolist()
    ((_, _, others),) = kept_by_heads(CompressKV(heads=((0, 3),), window=4), texts, **sizes)
    assert others != kept


def test_compresskv_gives_each_layer_its_room():
    rooms = [CompressKV(rooms=(30, 60, 90)).groups(layer, RUN)[0] for layer in range(3)]
    assert [(of.prompt_room, of.room) for of in rooms] == [(30, 94), (60, 124), (90, 154)]
