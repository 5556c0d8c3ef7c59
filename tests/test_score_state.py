"""What a sketch keeps in the cache: each request's own code, and every full page by that code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache.offloaded import OffloadedGroup
from flexijax.engine.engine import Engine
from flexijax.engine.plan import make_program
from flexijax.engine.sampling import Sampling
from flexijax.engine.sequence import Request
from flexijax.pallas_kernels.sketch_scores import reference
from flexijax.pallas_kernels.sketches import SPACING
from flexijax.policies.flexi import Flexi
from flexijax.policies.sketch import Sketch
from tests.tiny_models import tiny_model

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


def assert_own_code(engine, running, bits):
    """By float64 NumPy from the keys that the cache itself holds, of both kinds of heads."""
    cache, row, shape = (
        jax.device_get(engine.cache),
        running.slot,
        engine.program.layout.sizes.shape,
    )
    prompt = len(running.request.tokens)
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


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_request_has_its_own_code(bits):
    """Two requests of different lengths, and a third in the row of the first to end."""
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
        budget_tokens=16,
        rerank_interval=STEPS,
        profile=profile,
    )
    program = make_program(lm, config, max_tokens=100, batch=2)
    engine = Engine(lm, program, progress=None)
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
    assert third.slot == first.slot
    engine.step()
    for running in (second, third):
        assert_own_code(engine, running, bits)
    after = engine.cache.layers[0].groups[0].score_state
    np.testing.assert_array_equal(after.mean[second.slot], kept.mean[second.slot])
    assert np.abs(after.mean[third.slot] - kept.mean[third.slot]).max() > 0
    assert jnp.isfinite(after.mean).all()
