"""What a sketch keeps in the cache: each request's own code, and every full page by that code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache.offloaded import OffloadedGroup
from flexijax.cache.refit import is_due
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
        jax.device_get(engine.cache),
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


def make_engine(bits, *, budget=16):
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
        policy=Flexi(score=Sketch(bits)),
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
    kept = jax.tree.map(np.array, engine.cache.layers[0].groups[0].score_state)
    engine.release(first)
    third = engine.admit(request(3, 40, 30), "")
    assert third.slot == first.row
    engine.step()
    for running in (second, third):
        assert_own_code(engine, running, bits)
    after = engine.cache.layers[0].groups[0].score_state
    np.testing.assert_array_equal(after.mean[second.row], kept.mean[second.row])
    assert np.abs(after.mean[third.row] - kept.mean[third.row]).max() > 0
    assert jnp.isfinite(after.mean).all()


def test_a_short_prompt_is_fitted_anew_before_pages_are_chosen():
    """A prompt of one token, beside a long one whose code stays as it is."""
    engine = make_engine(2, budget=32)
    short, long = engine.admit(request(1, 1, 60), ""), engine.admit(request(2, 40, 60), "")
    for length, fitted in ((9, 1), (17, 1), (25, 24), (33, 24), (41, 24), (49, 24)):
        engine.step()
        assert engine.cache is not None and engine.cache.lengths[short.row] == length
        if fitted > 1:
            assert_own_code(engine, short, 2, fitted=fitted)
        assert_own_code(engine, long, 2)
        # As a request that was chosen for by what one token says would not.
        if length > 33:
            stats = engine.stats(short)
            assert any(head.choices and head.overlap < head.reranks for head in stats.heads)


@pytest.mark.parametrize(
    ("begins", "steps", "prompt", "due_at"),
    [
        (1024, 16, 1, 1009),  # at 1025 not every page is attended
        (1024, 16, 1000, 1016),
        (1024, 16, 1023, 1039),  # one chunk too late, but by a code of a full prompt
        (1024, 16, 1024, None),
        (32, 128, 1, 129),  # a chunk that is longer than the budget
        (None, 16, 1, None),
    ],
)
def test_when_a_state_is_fitted_anew(begins, steps, prompt, due_at):
    lengths = range(prompt, 3000, steps)
    due = [at + steps for at in lengths if is_due(begins, steps, prompt=prompt, before=at)]
    assert due == ([] if due_at is None else [due_at])
