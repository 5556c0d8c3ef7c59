"""Steps that are dispatched before the tokens of those before them are fetched, as on a GPU."""

import dataclasses

import numpy as np
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.pallas_kernels import platform
from tests.planted import words_tokenizer
from tests.test_engine import ARRIVALS, BLOCKS, CACHES, _bytes, engine_of, prompt_of
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.any_jax

STEPS = 4  # of a boundary


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(tiny_model(), tokenizer=words_tokenizer())


def ahead_engine(lm, monkeypatch, cache=CACHES["flexi"], *, ahead=True, **sizes):
    monkeypatch.setattr(platform, "dispatches_ahead", lambda: ahead)
    return engine_of(lm, cache, **sizes)


def events_of(engine, monkeypatch):
    """What a runner is asked for from now on: "dispatch", "collect"."""
    events, runner = [], engine._core.runner
    for name in ("dispatch", "collect"):
        method = getattr(runner, name)

        def seen(*args, name=name, method=method):
            events.append(name)
            return method(*args)

        monkeypatch.setattr(runner, name, seen)
    return events


def tables_agree(engine):
    """Whether the blocks of running rows are on the device what the host thinks they are."""
    runner = engine._core.runner
    if runner.cache is None:
        return True
    there = np.asarray(all_rows(runner.cache).block_table)
    rows = [row for row, of in runner.running.items() if of.tokens]
    return np.array_equal(there[rows], runner._tables[rows])


def storm(engine, stop_id):
    """The ends of requests that come, are cancelled, stop early and share three rows."""
    streams = []
    for at, (length, new, after) in enumerate(ARRIVALS):
        for _ in range(after):
            engine.step()
            assert tables_agree(engine)
        sampling = flexijax.Sampling(stop_ids=(stop_id,) if at == 1 else ())
        streams.append(engine.submit(prompt_of(length), max_new_tokens=new, sampling=sampling))
    text = flexijax.Sampling(temperature=1.0, seed=7, stop=("a",))
    streams.append(engine.submit(prompt_of(30), max_new_tokens=40, sampling=text))
    for _ in range(6):
        engine.step()
    streams[3].cancel()
    while engine.step():
        assert tables_agree(engine)
    assert engine.num_running == 0 and engine.num_free_blocks == engine.num_blocks
    assert not engine._core.runner.in_flight and not engine._core._in_flight
    return [stream.result() for stream in streams]


@pytest.mark.parametrize("name", ["full", "flexi", "h2o"])
@pytest.mark.parametrize("short", [False, True])
def test_tokens_are_those_of_an_engine_that_waits(lm, monkeypatch, name, short):
    cache = CACHES[name]
    if short and name != "flexi":
        pytest.skip("rows of these hold what they need from the start")
    sizes = {}
    if short:
        sizes = dict(usual_context=8, device_bytes=_bytes(lm, cache, blocks=BLOCKS))
    [wanted] = [
        engine_of(lm, cache).submit(prompt_of(n), max_new_tokens=new).result()
        for n, new, _ in ARRIVALS[1:2]
    ]
    stop = wanted.token_ids[20]
    waits = storm(ahead_engine(lm, monkeypatch, cache, ahead=False, **sizes), stop)
    made = storm(ahead_engine(lm, monkeypatch, cache, **sizes), stop)
    for at, (one, other) in enumerate(zip(waits, made, strict=True)):
        assert one.finish_reason == other.finish_reason
        assert one.text == other.text or at == 3
        if at == 3:  # cancelled, at one boundary or the next
            few = min(len(one.token_ids), len(other.token_ids))
            assert one.token_ids[:few] == other.token_ids[:few]
        else:
            assert one.token_ids == other.token_ids
            assert one.metrics.evicted_tokens == other.metrics.evicted_tokens
    assert made[1].finish_reason == made[6].finish_reason == "stop"
    if short:
        assert sum(one.metrics.pauses for one in made) > 0


def test_the_next_steps_are_dispatched_before_the_last_tokens_are_fetched(lm, monkeypatch):
    engine = ahead_engine(lm, monkeypatch)
    stream, events = engine.submit(prompt_of(50), max_new_tokens=34), []
    events = events_of(engine, monkeypatch)
    while engine.step():
        assert len(engine._core.runner.in_flight) <= 1
    # The first token came with the prompt, and nothing runs for tokens that nobody asked for.
    count = -(-33 // STEPS)
    assert events == ["dispatch", *["dispatch", "collect"] * (count - 1), "collect"]
    assert len(stream.result().token_ids) == 34


def test_a_stop_costs_one_dispatch_at_most(lm, monkeypatch):
    """And who comes into the row that it leaves has the tokens that it has alone."""
    alone = ahead_engine(lm, monkeypatch, ahead=False)
    wanted = [alone.submit(prompt_of(n), max_new_tokens=30).result().token_ids for n in (50, 61)]
    engine = ahead_engine(lm, monkeypatch, max_requests=1)
    stop = flexijax.Sampling(stop_ids=(wanted[0][12],))
    first = engine.submit(prompt_of(50), max_new_tokens=60, sampling=stop)
    second = engine.submit(prompt_of(61), max_new_tokens=30)
    events = events_of(engine, monkeypatch)
    while not first.done:
        engine.step()
    made = first.result()
    assert made.finish_reason == "stop"
    assert made.token_ids == wanted[0][: wanted[0].index(stop.stop_ids[0])]
    needed = -(-len(made.token_ids) // STEPS)
    assert needed <= events.count("dispatch") <= needed + 1
    assert second.result().token_ids == wanted[1]


def test_a_failure_loses_what_ran_and_nothing_else(lm, monkeypatch):
    engine = ahead_engine(lm, monkeypatch)
    wanted = engine.submit(prompt_of(50), max_new_tokens=30).result().token_ids
    runner, count = engine._core.runner, iter(range(100))
    dispatch = runner.dispatch

    def failing(rows):
        if next(count) == 2:
            raise MemoryError("no room")
        dispatch(rows)

    monkeypatch.setattr(runner, "dispatch", failing)
    lost = engine.submit(prompt_of(50), max_new_tokens=30)
    with pytest.raises(flexijax.EngineError, match="no room"):
        lost.result()
    assert not runner.in_flight and not engine._core._in_flight
    assert engine.submit(prompt_of(50), max_new_tokens=30).result().token_ids == wanted
