"""Prompts that begin alike share blocks; nobody's tokens tell whether they did."""

import dataclasses

import jax
import numpy as np
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.policies.flexi import Flexi
from flexijax.policies.index_cache import IndexCache
from flexijax.policies.minmax import MinMax
from flexijax.policies.quest import Quest
from flexijax.policies.sketch import Sketch
from flexijax.policies.snapkv import SnapKV
from tests.tiny_models import tiny_model
from tests.tiny_runs import SMALL

pytestmark = pytest.mark.usefixtures("short_chunks")

CHUNK, CODE = 32, 64  # of `short_chunks`; tokens that a sketch's code is fitted on
POLICIES = {
    "flexi": Flexi(score=Sketch(fit_tokens=CODE)),
    "flexi minmax": Flexi(score=MinMax()),
    "quest": Quest(score=Sketch(fit_tokens=CODE)),
    "index_cache": IndexCache(score=Sketch(fit_tokens=CODE)),
}
SAMPLING = flexijax.Sampling(logprobs=True)


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module", params=POLICIES)
def cache(request):
    return dataclasses.replace(SMALL, policy=POLICIES[request.param])


def engine_of(lm, cache, **sizes):
    return flexijax.Engine(lm, cache=cache, **{"max_requests": 3, "max_context": 192, **sizes})


def text(length, seed):
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


DOCUMENT = text(107, 0)
PROMPTS = [DOCUMENT + text(length, seed) for seed, length in ((1, 9), (2, 30), (3, 1), (1, 9))]


def answers(engine, prompts=PROMPTS, **options):
    streams = [
        engine.submit(prompt, max_new_tokens=20, sampling=SAMPLING, **options) for prompt in prompts
    ]
    return [stream.result() for stream in streams]


def test_hits_and_misses_give_the_same_to_the_bit(lm, cache):
    """Tokens and log-probabilities, with other requests beside them, against no sharing at all."""
    engine = engine_of(lm, cache)
    wanted = answers(engine_of(lm, cache, prefix_caching=False))
    made = answers(engine)
    for one, other in zip(made, wanted, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.metrics.promoted_pages == other.metrics.promoted_pages
    cached = [one.metrics.cached_tokens for one in made]
    assert cached == [0, 96, 96, 96]
    assert all(one.metrics.cached_tokens == 0 for one in wanted)
    assert engine.totals.cached_tokens == sum(cached)
    assert engine.num_free_blocks == engine.num_blocks
    # Long after whoever wrote the blocks has gone, too.
    again = answers(engine)
    assert [one.metrics.cached_tokens for one in again] == [96, 128, 96, 96]
    assert [one.logprobs for one in again] == [one.logprobs for one in wanted]


def test_choices_of_a_prompt_read_its_whole_chunks_once(lm, cache):
    """And say what that many requests of `generate` say, each its own."""
    hot = flexijax.Sampling(logprobs=True, temperature=1.0, seed=3)
    asked = {"max_new_tokens": 20, "sampling": hot}
    engine = engine_of(lm, cache)
    first = engine.submit(PROMPTS[0], **asked)
    made = [stream.result() for stream in engine.submit_choices(PROMPTS[0], n=3, **asked)]
    assert len({one.token_ids for one in made}) == 3
    assert [one.metrics.cached_tokens for one in made] == [96, 96, 96]
    assert first.result().metrics.cached_tokens == 0
    assert first.result().token_ids == made[0].token_ids
    wanted = flexijax.generate(lm, [PROMPTS[0]] * 3, cache=cache, max_batch=3, **asked)
    assert [one.token_ids for one in made] == [one.token_ids for one in wanted]


def test_what_is_shared_is_not_written_again(lm, cache):
    """Nor counted twice: the shared blocks' bytes in both tiers stay what the first one wrote."""
    engine = engine_of(lm, cache)
    answers(engine, PROMPTS[:1])
    shared = engine._core.pool.match(PROMPTS[1])
    assert len(shared) == 96 // SMALL.page_size
    before = _of_blocks(engine, shared)
    assert all(np.abs(np.asarray(leaf, np.float64)).max() > 0 for leaf in before)
    answers(engine, PROMPTS[1:])
    for one, other in zip(before, _of_blocks(engine, shared), strict=True):
        np.testing.assert_array_equal(one, other)


def _of_blocks(engine, blocks):
    """The rows of those blocks in every array that has a row for each block."""
    layers = all_rows(engine._core.runner.cache).layers
    held = [
        leaf
        for leaf in jax.tree.leaves([(layer.groups, layer.host) for layer in layers])
        if leaf.shape[0] == engine.num_blocks
    ]
    assert len(held) >= 5  # keys and values of two layers, and a summary
    return [np.array(leaf)[blocks] for leaf in held]


def test_memory_that_is_needed_is_taken_from_what_nobody_holds(lm, cache):
    """More documents than the pools hold, over and over: what is forgotten is read anew."""
    engine, plain = engine_of(lm, cache), engine_of(lm, cache, prefix_caching=False)
    prompts = [text(130, seed) for seed in range(6)] * 2
    wanted = [answers(plain, [prompt])[0].logprobs for prompt in prompts]
    assert [answers(engine, [prompt])[0].logprobs for prompt in prompts] == wanted
    assert engine._core.pool.counts.evicted > 0
    assert engine.num_free_blocks == engine.num_blocks


def test_salts_do_not_share(lm, cache):
    engine = engine_of(lm, cache)
    answers(engine, PROMPTS[:1], cache_salt="a")
    assert answers(engine, PROMPTS[:1], cache_salt="b")[0].metrics.cached_tokens == 0
    assert answers(engine, PROMPTS[:1], cache_salt="a")[0].metrics.cached_tokens == 96


def test_less_than_the_code_is_fitted_on_is_not_shared(lm):
    """A block is only good for whoever has the same code."""
    cache = dataclasses.replace(SMALL, policy=Flexi(score=Sketch(fit_tokens=100)))
    engine = engine_of(lm, cache)
    assert [one.metrics.cached_tokens for one in answers(engine)] == [0, 0, 0, 0]


@pytest.mark.parametrize("policy", ["full", SnapKV(window=4), "h2o", "streaming_llm"], ids=str)
def test_policies_that_do_not_keep_all_by_block_share_nothing(lm, policy):
    engine = engine_of(lm, dataclasses.replace(SMALL, policy=policy))
    assert [one.metrics.cached_tokens for one in answers(engine)] == [0, 0, 0, 0]


def test_generate_shares_what_its_prompts_begin_with(lm, cache):
    made = flexijax.generate(lm, PROMPTS, max_new_tokens=20, cache=cache, sampling=SAMPLING)
    assert [one.metrics.cached_tokens for one in made] == [0, 96, 96, 96]
    apart = [
        flexijax.generate(lm, [prompt], max_new_tokens=20, cache=cache, max_batch=1)[0]
        for prompt in PROMPTS
    ]
    assert [one.token_ids for one in made] == [one.token_ids for one in apart]


def test_what_was_shared_is_lost_with_the_arrays(lm, cache, monkeypatch):
    """A step that fails takes them along, and later requests begin in new ones."""
    engine = engine_of(lm, cache)
    [right] = answers(engine, PROMPTS[:1])
    step = engine._core.runner.dispatch

    def failed(rows=None):
        monkeypatch.setattr(engine._core.runner, "dispatch", step)
        raise MemoryError("no room")

    monkeypatch.setattr(engine._core.runner, "dispatch", failed)
    with pytest.raises(flexijax.EngineError, match="no room"):
        answers(engine, PROMPTS[:1])
    [made] = answers(engine, PROMPTS[:1])
    assert (made.token_ids, made.logprobs) == (right.token_ids, right.logprobs)
    assert made.metrics.cached_tokens == 0
