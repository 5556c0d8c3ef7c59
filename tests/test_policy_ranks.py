"""What each method ranks against its float64 formula, on random queries and keys, no model."""

import functools

import jax
import numpy as np
import pytest

from flexijax.policies import h2o, snapkv, streaming_llm
from flexijax.policies.base import PolicyState
from flexijax.policies.h2o import H2O
from flexijax.policies.snapkv import SnapKV
from flexijax.policies.streaming_llm import StreamingLLM
from tests.h2o_simulation import simulate_h2o
from tests.policy_cases import (
    SCALE,
    assert_keeps_the_best,
    evicting,
    kept_by,
    make_tokens,
    make_window,
    random_text,
)

SEEDS = (0, 1, 2)
texts = pytest.mark.parametrize("query_heads", [1, 3])
lengths = pytest.mark.parametrize("length", [40, 97, 300])


def close(observed, expected):
    np.testing.assert_allclose(observed, expected, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=0)
def observe(policy, state, window, tokens):
    return policy.observe(state, window, tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def observed_rank(policy, group, window, tokens):
    """The rank float32[T] after one window, from no state."""
    state = policy.observe(policy.init_state(len(tokens.k)), window, tokens)
    return policy.rank_tokens(group, state, tokens)


def snapkv_rank(policy, q, k, *, length, room=64, first=0):
    """The rank float32[T] after the last queries of a prompt; k may hold T > length rows."""
    position = np.where(np.arange(len(k)) < length, np.arange(len(k)), -1)
    q_position = np.arange(first, length)[-policy.window :]
    tokens = make_tokens(k, position, length=length)
    window = make_window(q[:, q_position], q_position, k, position)
    return np.asarray(observed_rank(policy, evicting(room), window, tokens))


@texts
@pytest.mark.parametrize(
    ("length", "window", "kernel"),
    [(40, 7, 5), (40, 33, 3), (97, 33, 1), (97, 1, 9), (300, 7, 5), (300, 64, 13)],
)
def test_snapkv_equals_its_oracle(query_heads, length, window, kernel):
    for seed in SEEDS:
        q, k = random_text(seed, query_heads=query_heads, length=length)
        rank = snapkv_rank(SnapKV(window=window, kernel=kernel), q, k, length=length)
        expected = snapkv.oracle(q, k, scale=SCALE, window=window, kernel=kernel)
        assert np.isinf(expected).sum() == window
        close(rank, expected)
        for room in (window + 1, length - 1):
            assert_keeps_the_best(rank, expected, room)


def test_snapkv_oracle_by_hand():
    # The last token attends to the four with weights 1, 2, 3 and 2 eighths; a pool of 3 halves
    # of zeros at both ends, the window's own weight not among them.
    k = np.log([[1.0], [2.0], [3.0], [2.0]])
    found = snapkv.oracle(np.ones((1, 4, 1)), k, scale=1.0, window=1, kernel=3)
    close(found, [3 / 24, 6 / 24, 5 / 24, np.inf])


def test_snapkv_keeps_all_of_a_prompt_within_its_window():
    q, k = random_text(0, query_heads=3, length=40)
    assert np.isposinf(snapkv_rank(SnapKV(window=64), q, k, length=40)).all()
    assert np.isposinf(snapkv_rank(SnapKV(window=40), q, k, length=40)).all()
    assert not np.isposinf(snapkv_rank(SnapKV(window=39), q, k, length=40)).all()


def test_snapkv_leaves_absent_queries_out_of_the_mean():
    policy = SnapKV(window=9, kernel=1)
    q, k = random_text(0, query_heads=3, length=40)
    position = np.arange(40)
    tokens = make_tokens(k, position, length=40)
    full = make_window(q[:, -9:], position[-9:], k, position)
    absent = np.array([0, 1, 4, 8])
    there = np.setdiff1d(np.arange(9), absent)
    q_position = position[-9:].copy()
    q_position[absent] = -1
    window = make_window(q[:, -9:], q_position, k, position)
    assert np.isneginf(window.logits[:, absent]).all()
    rank = observed_rank(policy, evicting(20), window, tokens)
    weights = np.exp(np.asarray(full.logits, np.float64) - np.asarray(full.lse)[..., None])
    close(rank[:31], weights[:, there].mean(axis=(0, 1))[:31])


def test_snapkv_does_not_mind_rows_beyond_the_prompt():
    policy = SnapKV(window=7, kernel=5)
    q, k = random_text(0, query_heads=3, length=97)
    padded = np.concatenate([k, np.full((31, k.shape[1]), np.nan, np.float32)])
    rank = snapkv_rank(policy, q, padded, length=97)
    close(rank[:97], snapkv_rank(policy, q, k, length=97))


def h2o_sums(q, k, order, *, block):
    """The state float32[T] after all queries, `block` at a time, tokens held in that order."""
    length = len(k)
    state, tokens = H2O().init_state(length), make_tokens(k[order], order, length=length)
    for start in range(0, length, block):
        q_position = np.arange(start, min(start + block, length))
        window = make_window(q[:, q_position], q_position, k[order], order)
        state = observe(H2O(), state, window, tokens)
    return np.asarray(state.tokens)


@texts
@lengths
def test_h2o_equals_its_oracle(query_heads, length):
    for seed in SEEDS:
        q, k = random_text(seed, query_heads=query_heads, length=length)
        order = np.arange(length)
        sums, expected = h2o_sums(q, k, order, block=length), h2o.oracle(q, k, scale=SCALE)
        close(sums, expected)
        assert expected.sum() == pytest.approx(query_heads * length)
        tokens, state = make_tokens(k, order, length=length), PolicyState(tokens=sums)
        for recent, room in ((0.0, 13), (0.5, 13), (0.5, length - 1), (1.0, 13)):
            newest = order >= length - int(recent * room)
            rank = H2O(recent=recent).rank_tokens(evicting(room), state, tokens)
            by_rule = np.where(newest, np.inf, expected)
            close(rank, by_rule)
            assert_keeps_the_best(rank, by_rule, room)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_h2o_sums_do_not_depend_on_the_blocks(block):
    q, k = random_text(0, query_heads=3, length=97)
    order = np.arange(97)
    close(h2o_sums(q, k, order, block=block), h2o.oracle(q, k, scale=SCALE))


def test_h2o_stays_with_the_tokens_wherever_they_are():
    q, k = random_text(0, query_heads=3, length=97)
    order = np.random.default_rng(1).permutation(97)
    sums = h2o_sums(q, k, order, block=20)
    expected = h2o.oracle(q, k, scale=SCALE)
    close(sums, expected[order])
    state = PolicyState(tokens=sums)
    rank = H2O().rank_tokens(evicting(20), state, make_tokens(k[order], order, length=97))
    by_rule = np.where(np.arange(97) >= 87, np.inf, expected)
    close(rank, by_rule[order])


def test_h2o_oracle_by_hand():
    # Equal logits: query w gives 1 / (w + 1) to each token up to its own.
    found = h2o.oracle(np.zeros((2, 3, 1)), np.zeros((3, 1)), scale=1.0)
    close(found, [2 * (1 + 1 / 2 + 1 / 3), 2 * (1 / 2 + 1 / 3), 2 / 3])


def evict_one_at_a_time(q, k, *, scale, room, recent, prompt, steps):
    """H2O as the paper tells it: token by token, one leaves when there is one too many."""
    weight, found = {}, []
    for at in range(prompt + steps):
        weight[at] = 0.0
        for head in q.astype(np.float64):
            shares = {t: np.exp(scale * float(head[at] @ k[t])) for t in weight}
            for t, share in shares.items():
                weight[t] += share / sum(shares.values())
        if at < prompt - 1:
            continue
        while len(weight) > room:
            old = [t for t in weight if t < at + 1 - int(recent * room)]
            del weight[min(old, key=lambda t: weight[t])]
        found.append(sorted(weight))
    return found


@texts
@pytest.mark.parametrize(("prompt", "recent"), [(1, 0.5), (9, 0.0), (30, 0.5), (30, 1.0)])
def test_the_simulation_equals_a_loop_over_steps(query_heads, prompt, recent):
    q, k = random_text(3, query_heads=query_heads, length=prompt + 25)
    case = {"scale": SCALE, "room": 12, "recent": recent, "prompt": prompt, "steps": 25}
    observed = simulate_h2o(q, k, chunk=1, **case)
    assert [kept.tolist() for kept in observed] == evict_one_at_a_time(q, k, **case)
    assert len(observed) == 26


def test_the_simulation_keeps_everything_where_there_is_room():
    q, k = random_text(0, query_heads=1, length=20)
    found = simulate_h2o(q, k, scale=SCALE, room=20, recent=0.5, prompt=8, steps=12, chunk=5)
    assert [kept.tolist() for kept in found] == [list(range(n)) for n in (8, 13, 18, 20)]


@texts
@pytest.mark.parametrize("chunk", [1, 4])
def test_h2o_in_slots_keeps_what_the_simulation_keeps(query_heads, chunk):
    room, prompt, steps, policy = 12, 30, 24, H2O()
    q, k = random_text(5, query_heads=query_heads, length=prompt + steps)
    case = {"scale": SCALE, "room": room, "recent": 0.5, "prompt": prompt, "steps": steps}
    expected = simulate_h2o(q, k, chunk=chunk, **case)

    group, position = evicting(room), np.arange(prompt)
    state = policy.init_state(prompt)
    starts = [0, *range(prompt, prompt + steps, chunk)]
    for at, (start, kept) in enumerate(zip(starts, expected, strict=True)):
        length = start + chunk if at else prompt
        q_position = np.arange(start, length)
        window = make_window(q[:, q_position], q_position, k[position], position)
        tokens = make_tokens(k[position], position, length=length)
        state = observe(policy, state, window, tokens)
        chosen = kept_by(policy.rank_tokens(group, state, tokens), room)
        assert sorted(position[chosen]) == kept.tolist()
        # New tokens take the places of those that leave, so slots are in no order.
        chosen = np.random.default_rng(at).permutation(chosen)
        position = np.concatenate([np.arange(length, length + chunk), position[chosen]])
        sums = np.asarray(state.tokens)[chosen]
        state = PolicyState(tokens=np.concatenate([np.zeros(chunk, np.float32), sums]))


@pytest.mark.parametrize("length", [1, 4, 24, 25, 97])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_streaming_llm_equals_its_oracle(length, sinks):
    policy, room = StreamingLLM(sinks=sinks), 24
    order = np.random.default_rng(length).permutation(length)
    tokens = make_tokens(np.zeros((length, 16), np.float32), order, length=length)
    rank = policy.rank_tokens(evicting(room), policy.init_state(length), tokens)
    kept = np.zeros(length)
    kept[order[kept_by(rank, room)]] = 1
    assert (kept == streaming_llm.oracle(length, sinks=sinks, room=room)).all()
    assert kept.sum() == min(length, room)
