"""What an engine compiles: rows of the length asked for, and nothing once requests run."""

import dataclasses

import jax
import numpy as np
import pytest

import flexijax
from flexijax.engine.inventory import all_calls
from flexijax.engine.jit_cache import forget_compiled
from flexijax.engine.plan import bucket
from flexijax.pallas_kernels import platform
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from flexijax.policies.quest import Quest
from flexijax.policies.sketch import Sketch
from tests.tiny_models import tiny_model
from tests.tiny_runs import SMALL

pytestmark = pytest.mark.usefixtures("short_chunks")

CONTEXT = 160
SKETCH = Sketch(fit_tokens=64)
POLICIES = {
    "full": "full",
    "quest": Quest(score=SKETCH),
    "flexi": Flexi(score=SKETCH),
    "flexi minmax": Flexi(score=MinMax()),
    "h2o": "h2o",
}
SAMPLING = flexijax.Sampling(temperature=0.7, top_p=0.9)


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_compiles_once_all_has_been(lm, policy):
    """A hit, prompts of one token and of all the room, codes fitted late: all of it was there."""
    forget_compiled()
    cache = dataclasses.replace(SMALL, policy=POLICIES[policy])
    told, names = [], []
    engine = flexijax.Engine(
        lm,
        cache=cache,
        max_requests=2,
        max_context=CONTEXT,
        progress=lambda *of: told.append(of),
    )

    def compiled(event, seconds, fun_name="", **_):
        if event.endswith("/backend_compile_duration"):
            names.append(fun_name)

    first = engine.compile(SAMPLING)
    # The first is at the compiler while the second is traced.
    counts = (0, *range(first - 1), first)
    assert told == [(f"compiling {first} programs", count, first) for count in counts]
    assert first > 4 and engine.compile(SAMPLING) == 0
    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        cached = 0
        for length, new in ((120, 28), (1, 40), (120, 5), (CONTEXT - 1, 1), (40, 60)):
            stream = engine.submit(text(length), max_new_tokens=new, sampling=SAMPLING)
            cached += stream.result().metrics.cached_tokens
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
    assert (cached > 0) == (policy in ("quest", "flexi", "flexi minmax"))
    ours = {call.function.__name__ for call in all_calls(engine._core.runner.program, lm.params)}
    assert len(ours) >= 6
    assert [name for name in names if any(one in name for one in ours)] == []


def test_rows_are_no_longer_than_asked(lm):
    """Whole tails of a prompt, and no bucket above: that would be memory that nobody can use."""
    engine = flexijax.Engine(lm, cache=SMALL, max_requests=3, max_context=67 * SMALL.page_size + 1)
    tail = platform.prefill_sizes()[1]
    pages = -(-(67 * SMALL.page_size + 1) // tail) * tail // SMALL.page_size
    assert engine.num_blocks == 3 * pages < 3 * bucket(68)
