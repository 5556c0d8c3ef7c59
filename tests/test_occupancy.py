"""What an engine says that it holds is what its requests hold."""

import dataclasses

import numpy as np
import pytest

import flexijax
from flexijax.cache.memory import request_bytes
from tests.tiny_models import tiny_model
from tests.tiny_runs import PAGE, SMALL, dense_greedy, prompt_of

CONTEXT, ROWS = 128, 2


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module")
def engine(lm):
    """Both tiers, and room for all of a context on the device: its tokens are the dense model's."""
    cache = dataclasses.replace(SMALL, budget_tokens=CONTEXT)
    made = flexijax.Engine(lm, cache=cache, max_requests=ROWS, max_context=CONTEXT)
    # One program to compile instead of two.
    made._core.runner.serve(flexijax.Sampling(alternatives=1))
    return made


def test_both_tiers_hold_what_requests_fill(engine):
    sampling = flexijax.Sampling(ignore_eos=True)
    streams = [
        engine.submit(prompt_of(length), max_new_tokens=60, sampling=sampling)
        for length in (30, 50, 9)
    ]
    assert engine.occupancy().waiting == 3
    while len(streams[1].tokens) < 10:
        engine.step()
    held = engine.occupancy()
    layout = engine._core.runner.program.layout
    running = [entry for entry in engine._core.entries.values() if entry.state.admitted]
    each = [request_bytes(layout, entry.state.tokens) for entry in running]
    assert (held.waiting, held.running, held.rows) == (1, ROWS, ROWS)
    assert held.used_blocks == engine.num_blocks - engine.num_free_blocks > 0
    # Blocks are granted ahead of the coming steps, and host pages count when they begin.
    ahead = ROWS * 2 * held.device_bytes // held.blocks
    assert abs(held.device_used - sum(one.device for one in each)) <= ahead
    assert 0 < held.device_used < held.device_bytes
    assert 0 < held.host_used < held.host_bytes
    moved = held.offloaded_bytes
    assert moved > 0
    while engine.step():
        pass
    done, ends = engine.occupancy(), [stream.result().metrics for stream in streams]
    assert (done.running, done.used_blocks, done.device_used, done.host_used) == (0, 0, 0, 0)
    assert done.offloaded_bytes == sum(one.offloaded_bytes for one in ends) >= moved
    assert done.promoted_bytes == sum(one.promoted_bytes for one in ends)
    assert engine.totals.stalled_s > 0
    assert [len(stream.tokens) for stream in streams] == [60] * 3
    assert CONTEXT % PAGE == 0


def test_tokens_come_with_what_was_likely(lm, engine):
    """For one who asks, beside one who does not; the alternatives are the dense model's."""
    plain = engine.submit(prompt_of(20), max_new_tokens=12)
    assert plain.outcome is None and plain.tokens == []
    asked = engine.submit(
        prompt_of(20),
        max_new_tokens=12,
        sampling=flexijax.Sampling(logprobs=True, alternatives=5),
    )
    made = asked.result()
    assert plain.result().token_ids == made.token_ids and plain.result().alternatives is None
    assert plain.outcome is plain.result()
    assert [token.id for token in plain.tokens] == list(made.token_ids)
    assert not any(token.alternatives for token in plain.tokens)
    _, logits = dense_greedy(lm, prompt_of(20), 12)
    logits = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :5]
    assert made.alternatives is not None and made.logprobs is not None
    assert [[one for one, _ in place] for place in made.alternatives] == best.tolist()
    found = np.array([[logprob for _, logprob in place] for place in made.alternatives])
    np.testing.assert_allclose(found, np.take_along_axis(logits, best, -1), atol=1e-4)
    assert [place[0] for place in made.alternatives] == list(
        zip(made.token_ids, made.logprobs, strict=True)
    )
    assert [token.logprob for token in asked.tokens] == list(made.logprobs)
    assert [token.alternatives for token in asked.tokens] == list(made.alternatives)


@pytest.mark.parametrize("wrong", [-1, 21, 1.5, True])
def test_a_wrong_number_of_alternatives_is_refused(wrong):
    with pytest.raises(ValueError, match=f"alternatives={wrong}"):
        flexijax.Sampling(alternatives=wrong)
