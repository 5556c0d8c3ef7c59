"""The engine under load: whatever runs beside a request, its tokens are those that it has alone."""

import asyncio
import dataclasses
import threading

import jax
import numpy as np
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.cache.memory import nbytes
from flexijax.engine.jit_cache import num_compiled
from tests.planted import words_tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import ADAPTIVE, SMALL

CACHES = {
    "full": dataclasses.replace(SMALL, policy="full"),
    "quest": dataclasses.replace(SMALL, policy="quest"),
    "flexi": SMALL,
    "adaptive": ADAPTIVE,
    "h2o": dataclasses.replace(SMALL, policy="h2o"),
}
CONTEXT, ROWS = 128, 3
# Room for one request of CONTEXT tokens, and two blocks more.
BLOCKS = CONTEXT // SMALL.page_size + 2
# (prompt tokens, new tokens, boundaries after the last one that it comes)
ARRIVALS = ((50, 21, 0), (61, 34, 0), (9, 40, 1), (33, 17, 2), (72, 25, 0), (40, 60, 4))


@pytest.fixture(scope="module")
def lm():
    model = tiny_model()
    return dataclasses.replace(model, tokenizer=words_tokenizer())


def prompt_of(length):
    return np.random.default_rng(length).integers(0, 97, length).tolist()


def engine_of(lm, cache=SMALL, **sizes):
    return flexijax.Engine(
        lm, cache=cache, **{"max_requests": ROWS, "max_context": CONTEXT, **sizes}
    )


def run_out(engine):
    while engine.step():
        pass
    assert engine.num_running == 0 and engine.num_free_blocks == engine.num_blocks


@pytest.fixture(scope="module", params=CACHES)
def cache(request):
    return CACHES[request.param]


@pytest.fixture(scope="module")
def alone(lm, cache):
    """Tokens of each request by itself, in an engine of the same sizes."""
    engine, found = engine_of(lm, cache), []
    for length, new, _ in ARRIVALS:
        found.append(engine.submit(prompt_of(length), max_new_tokens=new).result())
    return found


def test_requests_that_come_and_go_have_the_tokens_that_they_have_alone(lm, cache, alone):
    engine = engine_of(lm, cache)
    # Steps of all rows are a program of their own.
    for _ in range(ROWS):
        engine.submit(prompt_of(9), max_new_tokens=40, sampling=flexijax.Sampling(ignore_eos=True))
    run_out(engine)
    compiled, streams = num_compiled(), []
    for length, new, after in ARRIVALS:
        for _ in range(after):
            engine.step()
        streams.append(engine.submit(prompt_of(length), max_new_tokens=new))
    most = 0
    while engine.step():
        most = max(most, engine.num_running)
    assert most > 1
    for stream, wanted in zip(streams, alone, strict=True):
        made = stream.result()
        assert made.token_ids == wanted.token_ids
        assert made.finish_reason == wanted.finish_reason
        assert made.metrics.promoted_pages == wanted.metrics.promoted_pages
        assert made.metrics.evicted_tokens == wanted.metrics.evicted_tokens
        assert made.metrics.ttft_s >= made.metrics.queue_s >= 0
    assert num_compiled() == compiled, "the sizes are those of the engine, whoever comes"
    run_out(engine)


def test_what_is_cancelled_stopped_or_late_leaves_others_as_they_are(lm, cache, alone):
    engine = engine_of(lm, cache)
    streams = [
        engine.submit(prompt_of(length), max_new_tokens=new) for length, new, _ in ARRIVALS[:4]
    ]
    late = engine.submit(prompt_of(45), max_new_tokens=60, timeout_s=1e-3)
    stops = alone[1].token_ids[20]
    stopped = engine.submit(
        prompt_of(61), max_new_tokens=34, sampling=flexijax.Sampling(stop_ids=(stops,))
    )
    for _ in range(3):
        engine.step()
    streams[0].cancel()
    streams[3].cancel()
    run_out(engine)
    for at in (1, 2):
        assert streams[at].result().token_ids == alone[at].token_ids
    for at in (0, 3):
        made = streams[at].result()
        assert made.finish_reason == "cancelled"
        assert made.token_ids == alone[at].token_ids[: len(made.token_ids)]
        assert len(made.token_ids) < len(alone[at].token_ids)
    assert (late.result().finish_reason, late.result().token_ids) == ("deadline", ())
    first = alone[1].token_ids.index(stops)
    assert stopped.result().token_ids == alone[1].token_ids[:first]
    assert stopped.result().finish_reason == "stop"


def test_rows_that_cannot_grow_pause_and_go_on(lm, cache, alone):
    """Blocks for little more than one row: nobody is preempted, and nobody's tokens change."""
    program = engine_of(lm, cache)._core.runner.program
    if not any(
        group.kind in ("selected", "offloaded") for *_, group in program.layout.all_groups()
    ):
        pytest.skip("what this policy keeps lies in the rows")
    engine = engine_of(lm, cache, usual_context=8, device_bytes=_bytes(lm, cache, blocks=BLOCKS))
    assert (engine.num_blocks, engine._core.limits.rows) == (BLOCKS, ROWS)
    streams = [engine.submit(prompt_of(length), max_new_tokens=new) for length, new, _ in ARRIVALS]
    run_out(engine)
    made = [stream.result() for stream in streams]
    assert [one.token_ids for one in made] == [one.token_ids for one in alone]
    assert sum(one.metrics.pauses for one in made) > 0


def _bytes(lm, cache, *, blocks):
    """What an engine of ROWS rows and so many blocks takes on the device."""
    engine = engine_of(lm, cache)
    engine.submit([1, 2, 3], max_new_tokens=2).result()
    return _device_bytes(engine) - (engine.num_blocks - blocks) * _block_bytes(engine)


def _device_bytes(engine):
    """Of all arrays in device memory that the engine holds."""
    runner = engine._core.runner
    held = nbytes(runner.cache) - nbytes([layer.host for layer in runner.cache.pools])
    width = engine._core.lm.params["embed"]["embedding"].shape[1] * 4
    return held + nbytes(runner._prefiller._kv) + runner._prefiller.spec.tokens * width


def _block_bytes(engine):
    cache, blocks = all_rows(engine._core.runner.cache), engine.num_blocks
    pooled = [
        leaf
        for leaf in jax.tree.leaves([layer.groups for layer in cache.layers])
        if leaf.shape[0] == blocks
    ]
    return nbytes(pooled) // blocks


def test_the_arrays_are_what_the_budget_says(lm, cache):
    """Counted before anything is allocated, and the same afterwards, to the byte."""
    roomy = engine_of(lm, cache)
    roomy.submit([1, 2, 3], max_new_tokens=2).result()
    taken = _device_bytes(roomy)
    exact = engine_of(lm, cache, device_bytes=taken)
    assert (exact.num_blocks, exact._core.limits.rows) == (roomy.num_blocks, ROWS)
    short = engine_of(lm, cache, device_bytes=taken - 1)
    assert (short.num_blocks, short._core.limits.rows) != (roomy.num_blocks, ROWS)
    with pytest.raises(ValueError, match=r"device_bytes=1000 .*raise device_bytes"):
        engine_of(lm, cache, device_bytes=1000)


def test_pieces_join_to_the_text_and_come_while_others_run(lm):
    engine = engine_of(lm)
    first = engine.submit(prompt_of(50), max_new_tokens=30)
    second = engine.submit(prompt_of(61), max_new_tokens=30)
    pieces = list(first)
    assert "".join(pieces) == first.result().text != ""
    assert len(pieces) > 3
    assert "".join(second) == second.result().text


def test_many_tasks_and_threads_may_wait_at_once(lm):
    engine = engine_of(lm)
    wanted = [engine.submit(prompt_of(n), max_new_tokens=20).result().text for n in (20, 33, 47)]

    async def read(length):
        stream = engine.submit(prompt_of(length), max_new_tokens=20)
        return "".join([piece async for piece in stream])

    async def all_of_them():
        return await asyncio.gather(*(read(length) for length in (20, 33, 47)))

    assert asyncio.run(all_of_them()) == wanted
    found = {}

    def collect(length):
        found[length] = "".join(engine.submit(prompt_of(length), max_new_tokens=20))

    threads = [threading.Thread(target=collect, args=(length,)) for length in (20, 33, 47)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[length] for length in (20, 33, 47)] == wanted


def test_who_stops_listening_ends_the_request(lm):
    engine = engine_of(lm)

    async def first_piece():
        stream = engine.submit(prompt_of(20), max_new_tokens=60)
        pieces = aiter(stream)
        piece = await anext(pieces)
        await pieces.aclose()
        return stream, piece

    stream, piece = asyncio.run(first_piece())
    assert stream.result().finish_reason == "cancelled"
    assert stream.result().text.startswith(piece)
    run_out(engine)


@pytest.mark.parametrize("where", ["begin", "advance", "dispatch", "collect", "grow"])
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_program_that_fails_takes_only_what_ran_with_it(lm, monkeypatch, where, nth):
    """At every point of a request's life: others come after it, in new arrays, and are right."""
    engine = engine_of(lm, max_requests=2)
    wanted = engine.submit(prompt_of(33), max_new_tokens=30).result().token_ids
    runner, calls = engine._core.runner, []
    original = getattr(runner, where)

    def failing(*args, **options):
        calls.append(where)
        if len(calls) == nth:
            runner.cache = None  # as if the arrays had gone with it
            raise RuntimeError("out of memory, say")
        return original(*args, **options)

    monkeypatch.setattr(runner, where, failing)
    streams = [engine.submit(prompt_of(33), max_new_tokens=30) for _ in range(6)]
    run_out(engine)
    ended = [stream for stream in streams if stream.error is None]
    failed = [stream for stream in streams if stream.error is not None]
    assert 1 <= len(failed) <= 2 and len(ended) >= 4
    for stream in failed:
        with pytest.raises(flexijax.EngineError, match="out of memory, say"):
            stream.result()
    for stream in ended:
        assert stream.result().token_ids == wanted


def test_logits_that_are_no_numbers_fail_one_request(lm):
    broken = jax.tree.map(lambda leaf: leaf, lm.params)
    poisoned = broken["embed"]["embedding"].at[13].set(np.nan)
    broken = {**broken, "embed": {"embedding": poisoned}}
    model = dataclasses.replace(lm, params=broken)
    engine = engine_of(model)
    bad = engine.submit([1, 2, 13, 4], max_new_tokens=4)
    with pytest.raises(FloatingPointError, match="not finite"):
        bad.result()
    run_out(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_requests": 0}, "max_requests=0"),
        ({"max_context": 1}, "max_context=1"),
        ({"max_context": 10**9}, "max_context=1000000000 is more than"),
        ({"usual_context": 0}, "usual_context=0"),
        ({"device_bytes": "a lot"}, "device_bytes='a lot' must be bytes"),
        ({"host_bytes": 10}, "host_bytes=10 "),
        ({"progress": 5}, "progress=5"),
        ({"cache": "flexi"}, "cache='flexi'"),
    ],
)
def test_what_an_engine_cannot_be_made_of(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine_of(lm, **arguments)


def test_what_cannot_be_submitted(lm):
    engine = engine_of(lm)
    for arguments, message in (
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 100}, "would pass max_context=128"),
        ({"max_new_tokens": 4, "timeout_s": 0}, "timeout_s=0"),
        ({"max_new_tokens": 4, "timeout_s": float("nan")}, "timeout_s=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(prompt_of(50), **arguments)
    with pytest.raises(ValueError, match="is empty"):
        engine.submit([], max_new_tokens=4)
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        engine.submit_choices([1, 2], n=0, max_new_tokens=4)
    assert not engine.step()
