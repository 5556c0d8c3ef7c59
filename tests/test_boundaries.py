"""The engine may look at what was sampled before a chunk ends; nobody's tokens depend on it."""

import dataclasses

import pytest

from flexijax.cache.cache import all_rows
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import make_program
from flexijax.policies.streaming_llm import StreamingLLM
from tests.tiny_models import tiny_model
from tests.tiny_runs import ADAPTIVE, SMALL, request_of

CACHES = {
    "full": dataclasses.replace(SMALL, policy="full"),
    "quest": dataclasses.replace(SMALL, policy="quest"),
    "flexi": SMALL,
    "adaptive": ADAPTIVE,
    "streaming_llm": dataclasses.replace(SMALL, policy=StreamingLLM()),
}
NEW = 40


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def make_engine(lm, cache, boundary_steps):
    program = make_program(
        lm, cache, max_tokens=94, max_new_tokens=NEW, batch=2, boundary_steps=boundary_steps
    )
    return ModelRunner(lm, program, progress=None)


def alone(lm, cache, request):
    engine = make_engine(lm, cache, None)
    running = engine.admit(request, "")
    while running.active:
        engine.step()
    return running.tokens, engine.stats(running)


@pytest.mark.parametrize("name", CACHES)
def test_chunks_of_rows_need_not_end_together(name, lm):
    """The second request comes in the middle of the first one's chunk, and their chunks overlap."""
    cache = CACHES[name]
    requests = [request_of(52, max_new_tokens=NEW, index=0)]
    requests.append(request_of(37, max_new_tokens=NEW - 7, index=1))
    engine = make_engine(lm, cache, 2)
    assert (engine.program.steps, engine.program.chunk_steps) == (2, cache.chunk_steps)
    assert cache.chunk_steps >= 4
    first = engine.admit(requests[0], "")
    engine.step()
    second = engine.admit(requests[1], "")
    while first.active or second.active:
        engine.step()
        assert engine.cache is not None
        lengths = all_rows(engine.cache).lengths
        for running in (first, second):
            assert not running.active or running.held == int(lengths[running.row])
    for running, request in zip((first, second), requests, strict=True):
        tokens, stats = alone(lm, cache, request)
        assert running.tokens == tokens
        counted = engine.stats(running)
        assert (counted.promoted_pages, counted.evicted_tokens) == (
            stats.promoted_pages,
            stats.evicted_tokens,
        )
        assert [head.reranks for head in counted.heads] == [head.reranks for head in stats.heads]


def test_a_policy_that_observes_every_query_is_given_whole_chunks(lm):
    cache = dataclasses.replace(SMALL, policy="h2o")
    assert make_engine(lm, cache, 2).program.steps == cache.chunk_steps
