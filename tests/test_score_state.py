"""What a sketch keeps in the cache: each request's own code, and every full page by that code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.engine.engine import Engine, Request
from flexijax.engine.sampling import Sampling
from flexijax.generate import make_program
from flexijax.pallas_kernels.sketch_scores import reference
from flexijax.pallas_kernels.sketches import SPACING
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
    cache, row, layout = jax.device_get(engine.cache), running.row, engine.program.layout
    prompt = len(running.request.tokens)
    full = np.array(running.blocks)[: cache.lengths[row] // PAGE]
    checked = 0
    for held, host in zip(cache.layers, cache.host, strict=True):
        kinds = []
        if held.pages_k is not None:
            kinds.append((held.pages_k, held.paged_summaries, held.paged_state))
        if host is not None:
            kinds.append((host.k, held.slotted_summaries, held.slotted_state))
        for pages, summaries, state in kinds:
            for head in range(pages.shape[1]):
                keys = pages[full, head].reshape(-1, layout.shape.head_dim)
                mean, step = state.mean[row, head], state.step[row, head]
                if prompt % PAGE == 0:  # otherwise its last tokens need not be on the host
                    expected = reference.sketch_code(keys[:prompt], spacing=SPACING[bits])
                    np.testing.assert_allclose(mean, expected[0], rtol=1e-3, atol=1e-5)
                    np.testing.assert_allclose(step, expected[1], rtol=1e-3, atol=1e-5)
                levels = reference.sketch_levels(keys, mean, step, bits=bits)
                found = reference.sketch_unpack(summaries[full, head], layout.shape.head_dim)
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
        page_size=PAGE, budget_tokens=16, rerank_interval=STEPS, score=f"sketch{bits}"
    )
    program = make_program(lm, config, profile=profile, max_tokens=100, rows=2)
    engine = Engine(lm, program, progress=None)
    first, second = engine.admit(request(1, 64, 9), ""), engine.admit(request(2, 29, 30), "")
    for running in (first, second):
        assert_own_code(engine, running, bits)
    engine.step()
    assert not first.active
    assert_own_code(engine, second, bits)
    assert engine.cache is not None
    kept = jax.tree.map(np.array, engine.cache.layers[0].paged_state)
    engine.release(first)
    third = engine.admit(request(3, 40, 30), "")
    assert third.row == first.row
    engine.step()
    for running in (second, third):
        assert_own_code(engine, running, bits)
    after = engine.cache.layers[0].paged_state
    np.testing.assert_array_equal(after.mean[second.row], kept.mean[second.row])
    assert np.abs(after.mean[third.row] - kept.mean[third.row]).max() > 0
    assert jnp.isfinite(after.mean).all()
