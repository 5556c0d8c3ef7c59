"""Methods that drop tokens by what attention they got, or by the place: against float64 judges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.policies import a2sf, lazy_eviction, morphkv
from flexijax.policies.a2sf import A2SF
from flexijax.policies.base import PolicyState
from flexijax.policies.h2o import H2O
from flexijax.policies.kvcrush import KVCrush
from flexijax.policies.lacache import LaCache
from flexijax.policies.lazy_eviction import LazyEviction
from flexijax.policies.morphkv import MorphKV
from flexijax.policies.treekv import TreeKV
from tests import policy_simulation as judges
from tests.evicting_run import kept_by_heads
from tests.policy_cases import SCALE, evicting, make_tokens, make_window, random_text

ROOM, STEPS = 20, 24
CASES = {
    "a2sf": (A2SF(forgetting=0.8, recent=5), judges.A2SFJudge),
    "morphkv sum": (MorphKV(window=11), judges.MorphKVJudge),
    "morphkv max": (MorphKV(window=3, fuse="max"), judges.MorphKVJudge),
    "lazy_eviction": (LazyEviction(threshold=0.1, recent=4), judges.LazyEvictionJudge),
    "treekv": (TreeKV(sinks=2, window=9), judges.TreeKVJudge),
    "treekv alone": (TreeKV(sinks=0, window=1, attended=False), judges.TreeKVJudge),
    "kvcrush": (KVCrush(sinks=2, recent=0.2, page=2, window=5), judges.KVCrushJudge),
    "lacache": (LaCache(first=0.4, margin=3), judges.LaCacheJudge),
}
SIZES = {"room": ROOM, "steps": STEPS, "chunk": 8}


def close(observed, expected):
    np.testing.assert_allclose(observed, expected, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_cache_keeps_what_the_judge_keeps(name):
    """Of two heads, after the prompt and after every chunk; padding and free places are NaN.

    Of a prompt within the room all, until steps fill it.
    """
    policy, judge = CASES[name]
    for prompt in (53, 15):
        texts = [random_text(seed, query_heads=3, length=prompt + STEPS) for seed in (3, 4)]
        found = list(kept_by_heads(policy, texts, prompt=prompt, **SIZES))
        judged = [judge(ROOM, policy) for _ in texts]
        judges.follow(judged, texts, iter(found), window=policy.prompt_window)
        (first, *_, last), fits = [kept for *_, kept in found], prompt <= ROOM
        assert first != last and (first == [list(range(prompt))] * 2) == fits
        if name not in ("treekv alone", "lacache") and not fits:
            assert first[0] != first[1], "heads that agree would not show that each has its own"


@pytest.mark.parametrize("name", ["morphkv max", "treekv", "lacache"])
def test_it_does_so_after_every_step(name):
    policy, judge = CASES[name]
    texts = [random_text(9, query_heads=3, length=53 + 6)]
    found = kept_by_heads(policy, texts, prompt=53, **SIZES | {"steps": 6, "chunk": 1})
    judges.follow([judge(ROOM, policy)], texts, found, window=policy.prompt_window)


@functools.partial(jax.jit, static_argnums=0)
def observe(policy, state, window, tokens):
    return policy.observe(state, window, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def rank_tokens(policy, room, state, tokens):
    return policy.rank_tokens(evicting(room), state, tokens)


def state_after(policy, q, k, *, block, order=None, first=0):
    """The state of a head that holds a whole text, in any order, after queries from `first` on."""
    length = len(k)
    order = np.arange(length) if order is None else order
    tokens, state = make_tokens(k[order], order, length=length), policy.init_state(length)
    for start in range(first, length, block):
        at = np.arange(start, min(start + block, length))
        window = make_window(q[:, at], at, k[order], order)
        state = observe(policy, state, window, tokens)
    return state, tokens


@pytest.mark.parametrize(("forgetting", "block"), [(0.0, 97), (0.9, 10)])
def test_a2sf_equals_its_oracle(forgetting, block):
    q, k = random_text(0, query_heads=3, length=97)
    policy = A2SF(forgetting=forgetting, recent=9)
    order = np.random.default_rng(1).permutation(97)
    state, tokens = state_after(policy, q, k, block=block, order=order)
    expected = a2sf.oracle(q, k, scale=SCALE, forgetting=forgetting)
    np.testing.assert_allclose(state.tokens, expected[order], rtol=1e-5, atol=1e-12)
    rank = rank_tokens(policy, 30, state, tokens)
    assert np.isposinf(rank).tolist() == (order >= 88).tolist()


def test_a2sf_that_forgets_nothing_is_h2o():
    q, k = random_text(2, query_heads=3, length=97)
    mine, _ = state_after(A2SF(forgetting=1.0), q, k, block=20)
    other, _ = state_after(H2O(), q, k, block=20)
    np.testing.assert_allclose(mine.tokens, other.tokens, rtol=1e-6)


def test_a2sf_does_not_prefer_tokens_for_their_age():
    """Equal attention to all at every query: H2O keeps the oldest, A2SF evens them out."""
    q, k = np.zeros((1, 97, 16), np.float32), np.zeros((97, 16), np.float32)
    h2o, _ = state_after(H2O(), q, k, block=97)
    mine, _ = state_after(A2SF(forgetting=0.8), q, k, block=97)
    spread = [np.ptp(np.asarray(state.tokens)[:80]) for state in (h2o, mine)]
    assert spread[1] < 0.1 * spread[0]


def test_a2sf_leaves_absent_queries_out():
    q, k = random_text(0, query_heads=3, length=40)
    position = np.arange(40)
    tokens, policy = make_tokens(k, position, length=40), A2SF(forgetting=0.7)
    state = PolicyState(tokens=jnp.linspace(0.0, 1.0, 40))
    padded = np.array([36, 37, -1, -1])
    there = make_window(q[:, 36:38], padded[:2], k, position)
    window = make_window(q[:, 36:40], padded, k, position)
    expected = observe(policy, state, there, tokens)
    close(observe(policy, state, window, tokens).tokens, expected.tokens)


@pytest.mark.parametrize(
    ("window", "block", "fuse"), [(7, 97, "sum"), (20, 16, "max"), (97, 10, "sum")]
)
def test_morphkv_equals_its_oracle(window, block, fuse):
    q, k = random_text(0, query_heads=3, length=97)
    policy, order = MorphKV(window, fuse), np.random.default_rng(1).permutation(97)
    state, tokens = state_after(policy, q, k, block=block, order=order)
    rank = rank_tokens(policy, 98, state, tokens)
    expected = morphkv.oracle(q, k, scale=SCALE, window=window, fuse=fuse)
    close(rank, expected[order])
    assert np.isposinf(expected).sum() == window


def test_morphkv_looks_at_its_window_only():
    q, k = random_text(0, query_heads=3, length=97)
    other = np.concatenate([q[:, ::-1][:, :90], q[:, 90:]], axis=1)
    states = [state_after(MorphKV(7), text, k, block=10)[0] for text in (q, other)]
    np.testing.assert_array_equal(states[0].tokens, states[1].tokens)
    sums = [state_after(H2O(), text, k, block=10)[0] for text in (q, other)]
    assert not np.allclose(sums[0].tokens, sums[1].tokens, rtol=0.1)


def test_morphkv_goes_on_where_a_chunk_ends_early():
    q, k = random_text(0, query_heads=3, length=40)
    position, policy = np.arange(40), MorphKV(4)
    tokens, state = make_tokens(k, position, length=40), policy.init_state(40)
    for queries in ([30, 31, 32, -1, -1], [-1, -1, -1, -1, -1], [33, 34, -1, -1, -1]):
        at = np.array(queries)
        state = observe(policy, state, make_window(q[:, at], at, k, position), tokens)
    # The fifth query took the place of the first.
    at = np.array([34, 31, 32, 33])
    logits = SCALE * np.einsum("gwh,th->tw", q[:, at], k)
    expected = np.where(np.arange(40)[:, None] <= at, logits, -np.inf)
    np.testing.assert_allclose(state.tokens, expected, rtol=1e-4)


@pytest.mark.parametrize("block", [5, 60])
def test_lazy_eviction_equals_its_oracle(block):
    q, k = random_text(1, query_heads=2, length=60)
    policy, order = LazyEviction(threshold=0.05, recent=6), np.arange(60)[::-1]
    state, tokens = state_after(policy, q, k, block=block, order=order)
    logits = np.where(np.tri(60, dtype=bool), SCALE * q.astype(np.float64) @ k.T, -np.inf)
    weights = judges.softmax(logits).max(0)
    active, longest, rank = lazy_eviction.oracle(weights, threshold=0.05)
    np.testing.assert_array_equal(state.tokens["active"], active[order])
    np.testing.assert_array_equal(state.tokens["longest"], longest[order])
    assert len(set(longest)) > 5 and longest.max() > 20 and (longest[:50] == 0).any()
    observed = np.asarray(rank_tokens(policy, 20, state, tokens))
    close(observed[6:], rank[order][6:])
    assert np.isposinf(observed[:6]).all()


def test_lazy_eviction_waits_for_what_comes_back():
    """One token every 30 queries, one thrice within 10 and never again, which H2O weighs alike."""
    length = 100
    k, q = np.zeros((length, 16), np.float32), np.zeros((1, length, 16), np.float32)
    k[3, 0], k[35, 1] = 60.0, 60.0
    q[0, [30, 60, 90], 0], q[0, [41, 45, 49], 1] = 1.0, 1.0
    policy = LazyEviction(threshold=0.5, recent=5)
    state, tokens = state_after(policy, q, k, block=25)
    rank = rank_tokens(policy, 10, state, tokens)
    assert rank[3] > rank[35] > 0 > rank[5]
    assert state.tokens["longest"][3] == 30 and state.tokens["active"][3] == 90
