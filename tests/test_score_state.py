"""What a sketch keeps in the cache: each request's own code, and every full page by that code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.cache.offloaded import OffloadedGroup
from flexijax.cache.refit import RefitRule, is_due, refit_rule
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import make_program
from flexijax.engine.sampling import Sampling
from flexijax.engine.sequence import Request
from flexijax.pallas_kernels.sketch_scores import reference
from flexijax.pallas_kernels.sketches import SPACING
from flexijax.policies.flexi import Flexi
from flexijax.policies.sketch import Sketch
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("short_chunks")

PAGE, STEPS = 4, 8


def request(index, length, new):
    tokens = np.random.default_rng(index).integers(0, 97, length).tolist()
    return Request(
        index=index,
        tokens=tuple(tokens),
        max_new_tokens=new,
        sampling=Sampling(),
        seed=0,
        stop_ids=(),
    )


def assert_own_code(engine, running, bits, *, fitted=None):
    """By float64 NumPy from the keys that the cache itself holds, of both kinds of heads.

    fitted: the tokens whose code it is, None for the prompt's.
    """
    cache, row, shape = (
        jax.device_get(all_rows(engine.cache)),
        running.row,
        engine.program.layout.sizes.shape,
    )
    prompt = len(running.request.tokens) if fitted is None else fitted
    full = np.array(running.blocks)[: cache.lengths[row] // PAGE]
    checked = 0
    for layer_cache in cache.layers:
        for group, host in zip(layer_cache.groups, layer_cache.host, strict=True):
            pages = host.k if isinstance(group, OffloadedGroup) else group.k
            summaries, state = group.summaries, group.score_state
            for head in range(pages.shape[1]):
                keys = pages[full, head].reshape(-1, shape.head_dim)
                mean, step = state.mean[row, head], state.step[row, head]
                if prompt % PAGE == 0:  # otherwise its last tokens need not be on the host
                    expected = reference.sketch_code(keys[:prompt], spacing=SPACING[bits])
                    np.testing.assert_allclose(mean, expected[0], rtol=1e-3, atol=1e-5)
                    np.testing.assert_allclose(step, expected[1], rtol=1e-3, atol=1e-5)
                levels = reference.sketch_levels(keys, mean, step, bits=bits)
                found = reference.sketch_unpack(summaries[full, head], shape.head_dim)
                # A tie may fall to either side in float32.
                assert (found.reshape(levels.shape) == levels).mean() > 0.995
                assert levels.std() > 0.1, "codes that never change would pass"
                checked += 1
    assert checked == 4


def make_engine(bits, *, budget=16, fit_tokens=1024):
    lm = tiny_model()
    profile = flexijax.HeadProfile(
        model="tiny-llama",
        num_layers=2,
        num_kv_heads=2,
        unstable=((0, 1),),
        page_size=PAGE,
        budget_pages=4,
        source="by hand",
    )
    config = flexijax.CacheConfig(
        policy=Flexi(score=Sketch(bits, fit_tokens)),
        page_size=PAGE,
        budget_tokens=budget,
        rerank_interval=STEPS,
        profile=profile,
    )
    return ModelRunner(lm, make_program(lm, config, max_tokens=100, batch=2), progress=None)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_request_has_its_own_code(bits):
    """Two requests of different lengths, and a third in the row of the first to end."""
    engine = make_engine(bits)
    first, second = engine.admit(request(1, 64, 9), ""), engine.admit(request(2, 29, 30), "")
    for running in (first, second):
        assert_own_code(engine, running, bits)
    engine.step()
    assert not first.active
    assert_own_code(engine, second, bits)
    assert engine.cache is not None
    kept = jax.tree.map(np.array, all_rows(engine.cache).layers[0].groups[0].score_state)
    engine.release(first)
    third = engine.admit(request(3, 40, 30), "")
    assert third.row == first.row
    engine.step()
    for running in (second, third):
        assert_own_code(engine, running, bits)
    after = all_rows(engine.cache).layers[0].groups[0].score_state
    np.testing.assert_array_equal(after.mean[second.row], kept.mean[second.row])
    assert np.abs(after.mean[third.row] - kept.mean[third.row]).max() > 0
    assert jnp.isfinite(after.mean).all()


def test_a_short_prompt_is_fitted_anew_before_pages_are_chosen():
    """A prompt of one token, beside a long one whose code stays as it is."""
    engine = make_engine(2, budget=32)
    short, long = engine.admit(request(1, 1, 60), ""), engine.admit(request(2, 40, 60), "")
    for length, fitted in ((9, 1), (17, 1), (25, 24), (33, 24), (41, 24), (49, 24)):
        engine.step()
        assert engine.cache is not None and all_rows(engine.cache).lengths[short.row] == length
        if fitted > 1:
            assert_own_code(engine, short, 2, fitted=fitted)
        assert_own_code(engine, long, 2)
        # As a request that was chosen for by what one token says would not.
        if length > 33:
            stats = engine.stats(short)
            assert any(head.choices and head.overlap < head.reranks for head in stats.heads)


@pytest.mark.parametrize(
    ("rule", "steps", "prompt", "due_at"),
    [
        (RefitRule(1024, 1024), 16, 1, 1009),  # at 1025 not every page is attended
        (RefitRule(1024, 1024), 16, 1000, 1016),
        (RefitRule(1024, 1024), 16, 1023, 1039),  # too late, but by a code of a full prompt
        (RefitRule(1024, 1024), 16, 1024, None),
        (RefitRule(2048, 1024), 16, 1023, 2047),
        (RefitRule(2048, 1024), 16, 1024, None),  # its code is all that it can be
        (RefitRule(32, 32), 128, 1, 129),  # a chunk that is longer than the budget
        (None, 16, 1, None),
    ],
)
def test_when_a_state_is_fitted_anew(rule, steps, prompt, due_at):
    lengths = range(prompt, 3000, steps)
    due = [at + steps for at in lengths if is_due(rule, steps, prompt=prompt, before=at)]
    assert due == ([] if due_at is None else [due_at])


@pytest.mark.parametrize(
    ("budget", "fit_tokens", "rule"),
    [
        (32, 1024, RefitRule(32, 32)),
        (32, None, RefitRule(32, 32)),
        (32, 24, RefitRule(32, 24)),
        (2048, 24, None),  # every page is attended
    ],
)
def test_which_prompts_are_short(budget, fit_tokens, rule):
    engine = make_engine(2, budget=budget, fit_tokens=fit_tokens)
    assert refit_rule(engine.program.layout) == rule


@pytest.mark.parametrize("length", [7, 18, 40])
@pytest.mark.parametrize("fit_tokens", [18, 24, None])
def test_a_code_is_of_the_first_tokens(fit_tokens, length):
    """Against float64, with what must not be read not a number."""
    count = length if fit_tokens is None else min(length, fit_tokens)
    keys = np.random.default_rng(length).normal(3, 2, (2, 48, 8)).astype(np.float32)
    keys[:, 18:] *= 5
    unread = keys.copy()
    unread[:, count:] = np.nan
    pages = jnp.asarray(unread.reshape(2, 12, PAGE, 8).swapaxes(0, 1))
    state = Sketch(2, fit_tokens).fit(pages, jnp.int32(length))
    for head in range(2):
        mean, step = reference.sketch_code(keys[head, :count], spacing=SPACING[2])
        np.testing.assert_allclose(state.mean[head], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.step[head], step, rtol=1e-4)


def kept_of(engine, sequence, pages):
    """All that the scores keep of the request's first pages, and its states, as bytes."""
    cache = jax.device_get(all_rows(engine.cache))
    blocks = np.array(sequence.blocks)[:pages]
    return [
        np.asarray(leaf).tobytes()
        for layer in cache.layers
        for group in layer.groups
        for leaf in (
            *(leaf[blocks] for leaf in jax.tree.leaves(group.summaries)),
            *(leaf[sequence.row] for leaf in jax.tree.leaves(group.score_state)),
        )
    ]


def test_what_is_kept_of_a_page_depends_on_the_first_tokens_alone():
    """So a page can be shared: not on what follows in its prompt, nor on any other request."""
    common = request(1, 40, 1).tokens
    engine = make_engine(2, fit_tokens=24)
    first = request(2, 24, 30)
    first = engine.admit(dataclasses.replace(first, tokens=(*common, *first.tokens)), "")
    kept = kept_of(engine, first, 10)
    assert_own_code(engine, first, 2, fitted=24)
    engine.step()
    second = request(3, 9, 30)
    second = engine.admit(dataclasses.replace(second, tokens=(*common, *second.tokens)), "")
    assert kept_of(engine, second, 10) == kept
    engine.step()
    assert kept_of(engine, first, 10) == kept_of(engine, second, 10) == kept
    # One of the fitted tokens, and one behind them, in a page of its own.
    engine.release(first)
    for at, alike in ((23, False), (36, True)):
        tokens = [*common, *second.request.tokens[40:]]
        tokens[at] = (tokens[at] + 1) % 97
        third = engine.admit(dataclasses.replace(second.request, tokens=tuple(tokens)), "")
        assert (kept_of(engine, third, 9) == kept_of(engine, second, 9)) is alike
        engine.release(third)


def test_a_prompt_of_all_fitted_tokens_is_never_fitted_anew():
    """Though its pages are not chosen from before it has grown to twice its length."""
    engine = make_engine(2, budget=64, fit_tokens=24)
    long, short = engine.admit(request(1, 28, 60), ""), engine.admit(request(2, 20, 60), "")
    kept, before = kept_of(engine, long, 7), kept_of(engine, short, 5)
    for _ in range(6):
        engine.step()
    assert engine.cache is not None and all_rows(engine.cache).lengths[long.row] == 76
    assert kept_of(engine, long, 7) == kept
    assert_own_code(engine, long, 2, fitted=24)
    assert kept_of(engine, short, 5) != before
    assert_own_code(engine, short, 2, fitted=24)
