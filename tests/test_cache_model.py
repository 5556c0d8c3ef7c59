"""The cache against a plain NumPy model of it, under random admissions, finishes and reranks.

The model (cache_model.py) keeps each request for itself, so it also says that no request disturbs
another (law 6).
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from flexijax.cache.cache import all_rows
from flexijax.cache.layout import CacheLayout, CacheSizes
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.program import Program
from flexijax.engine.sampling import Sampling
from flexijax.engine.sequence import Request
from flexijax.engine.stats import HeadStats
from flexijax.models.language_model import LanguageModel
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.base import RunSpec
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from tests.cache_model import (
    BLOCKS,
    BUDGET,
    LAYERS,
    PAGE,
    PAGES,
    ROWS,
    SHAPE,
    STEPS,
    TABLES,
    UNSTABLE,
    VOCAB,
    Model,
    TableDecoder,
    ceil_pages,
)

# None reranks all heads after every chunk. The thresholds are such that intervals change both ways,
# and that no overlap of three pages lies on one, where float32 and float64 may round apart.
SCHEDULES = {
    "fixed": None,
    "adaptive": Adaptive(
        shortest=STEPS, longest=4 * STEPS, first=2 * STEPS, lengthen_at=0.45, shorten_at=0.22
    ),
}


def assert_same(engine, running, model):
    """Laws 2 and 3 for one request: both tiers, summaries, slots and statistics."""
    cache, row = jax.device_get(all_rows(engine.cache)), running.row
    length, table = len(model.tokens), running.blocks
    assert cache.lengths[row] == length
    assert cache.block_table[row, : len(table)].tolist() == list(table)
    kinds = []
    for layer, at, group in engine.program.layout.all_groups():
        held, host = cache.layers[layer].groups[at], cache.layers[layer].host[at]
        kinds.append((layer, group.kind, group.heads))
        same = assert_same_offloaded if group.kind == "offloaded" else assert_same_selected
        for i, head in enumerate(group.heads):
            same(model, layer, head, i, held, host, row, table)
        if group.kind == "offloaded" and model.adaptive:
            mine = [model.heads[layer, head] for head in group.heads]
            schedule = held.schedule
            assert schedule.interval[row].tolist() == [head.interval for head in mine]
            left = [head.steps_until_rerank for head in mine]
            assert schedule.steps_until_rerank[row].tolist() == left
    assert kinds == [(0, "selected", (1,)), (0, "offloaded", (0,)), (1, "offloaded", (0, 1))]
    stats = engine.stats(running)
    assert stats[:4] == (model.chunks, model.promoted, model.offloaded, 0)
    expected = [
        HeadStats(*key, of.reranks, of.overlap, of.rco, of.choices)
        for key, of in sorted(model.heads.items())
    ]
    np.testing.assert_allclose(stats.heads, expected, atol=1e-5)


def assert_same_offloaded(model, layer, head, i, held, host, row, table):
    """Of head number i of its group: slots, full pages on the host, and their summaries."""
    length = len(model.tokens)
    k, v = model.dense("k", layer, head), model.dense("v", layer, head)
    slots = model.heads[layer, head].slots
    assert held.slot_page[row, i].tolist() == slots
    readable = set()
    for slot, page in enumerate(slots):
        if 0 <= page < ceil_pages(length):
            part = slice(page * PAGE, min((page + 1) * PAGE, length))
            count = part.stop - part.start
            np.testing.assert_array_equal(held.k[row, i, :, slot, :count].T, k[part])
            np.testing.assert_array_equal(held.v[row, i, slot, :count], v[part])
            readable.add(page)
    for page in range(length // PAGE):
        part = slice(page * PAGE, (page + 1) * PAGE)
        np.testing.assert_array_equal(host.k[table[page], i], k[part])
        np.testing.assert_array_equal(host.v[table[page], i], v[part])
        bounds = [k[part].min(0), k[part].max(0)]
        np.testing.assert_array_equal(held.summaries[table[page], i], bounds)
        readable.add(page)
    assert readable == set(range(ceil_pages(length)))


def assert_same_selected(model, layer, head, i, held, host, row, table):
    """Of head number i of its group: every page in the pool, and summaries of full ones."""
    assert host is None
    length = len(model.tokens)
    k, v = model.dense("k", layer, head), model.dense("v", layer, head)
    for page in range(ceil_pages(length)):
        part = slice(page * PAGE, min((page + 1) * PAGE, length))
        count = part.stop - part.start
        np.testing.assert_array_equal(held.k[table[page], i, :count], k[part])
        np.testing.assert_array_equal(held.v[table[page], i, :count], v[part])
        if count == PAGE:
            bounds = [k[part].min(0), k[part].max(0)]
            np.testing.assert_array_equal(held.summaries[table[page], i], bounds)


def assert_all_on_host(engine, running, model):
    """That the full pages of a request that has ended reached the host, the last chunk's too."""
    cache = jax.device_get(all_rows(engine.cache))
    row, pages = running.row, len(model.tokens) // PAGE
    assert cache.lengths[row] == len(model.tokens)
    for layer, at, group in engine.program.layout.all_groups():
        if group.kind == "offloaded":
            host, table = cache.layers[layer].host[at], cache.block_table[row, :pages]
            for i, head in enumerate(group.heads):
                for name, pool in (("k", host.k), ("v", host.v)):
                    dense = model.dense(name, layer, head)[: pages * PAGE]
                    np.testing.assert_array_equal(pool[table, i].reshape(dense.shape), dense)


def assert_drawn(running, drawn, logits):
    """That token number `drawn` of the request is a most likely one, with its log-probability."""
    token, logprob = running.tokens[drawn], running.logprobs[drawn]
    assert logits[token] >= logits.max() - 1e-4
    expected = logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert logprob == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module", params=SCHEDULES)
def adaptive(request):
    return SCHEDULES[request.param]


@pytest.fixture(scope="module")
def make_engine(adaptive):
    policy = Flexi(MinMax("float32"), UNSTABLE)
    run = RunSpec(
        shape=SHAPE,
        page_size=PAGE,
        budget_tokens=BUDGET * PAGE,
        max_tokens=PAGES * PAGE,
        max_new_tokens=PAGES * PAGE,
        chunk_steps=STEPS,
        adaptive=adaptive,
        profile=None,
    )
    sizes = CacheSizes(
        shape=SHAPE,
        batch=ROWS,
        blocks=BLOCKS,
        pages=PAGES,
        page_size=PAGE,
        dtype="float32",
        chunk_steps=STEPS,
        bank=None if adaptive is None else 1,  # so that both are looked at
    )
    layout = CacheLayout(sizes, tuple(policy.groups(layer, run) for layer in range(LAYERS)))
    lm = LanguageModel(
        name="tables",
        decoder=TableDecoder(),
        params=jax.tree.map(jnp.asarray, TABLES),
        attention=SHAPE,
        vocab_size=VOCAB,
        max_context=PAGES * PAGE,
        dtype=jnp.dtype("float32"),
        tokenizer=None,
        fingerprint="tables",
    )
    program = Program(lm.decoder, layout, policy)
    return lambda: ModelRunner(lm, program, progress=None)


ADMIT = st.tuples(
    st.just("admit"),
    st.integers(1, 45),  # prompt tokens
    st.integers(1, 30),  # most new tokens
    st.booleans(),  # whether a token stops it
    st.integers(0, 9999),  # seed of the prompt
)
ACTIONS = st.lists(
    st.one_of(ADMIT, ADMIT, st.tuples(st.just("finish"), st.integers(0, 1))),
    min_size=2,
    max_size=5,
)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(actions=ACTIONS, steps=st.integers(1, 3))
def test_cache_is_what_the_plain_model_says(make_engine, adaptive, actions, steps):
    """After every action `steps` chunks run, so requests come and go at all stages of others."""
    engine, models = make_engine(), {}

    def end(running):
        del models[running.request.index]
        engine.release(running)

    for index, (action, *values) in enumerate(actions):
        if action == "finish":
            for running in list(engine.running.values())[values[0] :][:1]:
                engine.stop(running)
                end(running)
        else:
            length, max_new, stops, seed = values
            request = Request(
                index=index,
                tokens=tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist()),
                max_new_tokens=max_new,
                sampling=Sampling(),
                seed=0,
                stop_ids=(3, 7) if stops else (),
            )
            if engine.can_admit(request):
                running = engine.admit(request, "")
                models[index] = Model(request.tokens, adaptive)
                assert_drawn(running, 0, models[index].logits(everything=True))
                if not running.active:
                    end(running)
        for chunk in range(steps + 1):
            for running in list(engine.running.values()):
                assert_same(engine, running, models[running.request.index])
            if chunk == steps or not engine.running:
                break
            before = {slot: len(running.tokens) for slot, running in engine.running.items()}
            for running in engine.step():
                model, first = models[running.request.index], before[running.row]
                assert len(running.tokens) - first == STEPS or not running.active
                for drawn in range(first, len(running.tokens)):
                    model.tokens.append(running.tokens[drawn - 1])
                    assert_drawn(running, drawn, model.logits())
                if running.active:
                    model.rerank()
                else:
                    assert_all_on_host(engine, running, model)
                    end(running)
    assert all(running.active for running in engine.running.values())


def test_a_long_request_changes_its_intervals_both_ways(make_engine, adaptive):
    engine, seen, changes = make_engine(), set(), set()
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, VOCAB, 20).tolist()
        request = Request(
            index=0,
            tokens=tuple(prompt),
            max_new_tokens=PAGES * PAGE - 20,
            sampling=Sampling(),
            seed=0,
            stop_ids=(),
        )
        running = engine.admit(request, "")
        model = Model(prompt, adaptive)
        while running.active:
            before = {key: head.interval for key, head in model.heads.items()}
            first = len(running.tokens)
            engine.step()
            for drawn in range(first, len(running.tokens)):
                model.tokens.append(running.tokens[drawn - 1])
            if running.active:
                model.rerank()
                assert_same(engine, running, model)
            seen |= {head.interval for head in model.heads.values()}
            changes |= {head.interval > before[key] for key, head in model.heads.items()} - {False}
            changes |= {"shorter" for k, h in model.heads.items() if h.interval < before[k]}
        engine.release(running)
    if adaptive is None:
        assert seen == {STEPS} and not changes
    else:
        assert seen == {STEPS, 2 * STEPS, 4 * STEPS} and changes == {True, "shorter"}
