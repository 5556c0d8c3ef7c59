"""How a run ends when something is wrong in the middle: interrupts, numbers that are none."""

import dataclasses
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import flexijax
from flexijax.engine import jit_cache
from flexijax.engine.interrupts import deferred_interrupt
from flexijax.engine.sampling import SamplingRows, sampling_weights
from flexijax.generate import _batch
from tests.tiny_models import tiny_model

CACHE = flexijax.CacheConfig(policy="full", page_size=4, budget_tokens=16, rerank_interval=8)


@pytest.fixture
def interruptible():
    """As at a terminal: a process in the background may have been started to ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits_for_the_block(interruptible):
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
        done.append("the block")
    assert done == ["the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_compiling_leaves_a_model_that_runs(interruptible):
    lm, stages = tiny_model(num_layers=1), []

    def progress(stage, done, total):
        stages.append(stage)
        if stage == "compiling prefill" and stages.count(stage) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        flexijax.generate(lm, [[1, 2, 3]], max_new_tokens=3, cache=CACHE, progress=progress)
    assert stages[-1] == "compiling prefill"
    assert len(flexijax.generate(lm, [[1, 2, 3]], max_new_tokens=3, cache=CACHE)[0].token_ids) == 3


def test_logits_that_are_no_numbers_end_the_request():
    lm = tiny_model(num_layers=1)
    broken = dataclasses.replace(lm, params=jax.tree.map(lambda leaf: leaf * jnp.nan, lm.params))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        flexijax.generate(broken, [[1, 2, 3]], max_new_tokens=3, cache=CACHE)


@pytest.mark.parametrize("name", ["stream", "progress"])
def test_what_cannot_be_called_is_refused_before_anything_runs(name):
    lm = tiny_model(num_layers=1)
    with pytest.raises(ValueError, match=f"{name}=5 must be None or a function"):
        flexijax.generate(lm, [[1]], max_new_tokens=1, cache=CACHE, **{name: 5})


def test_a_page_longer_than_the_context_is_refused():
    lm = tiny_model(num_layers=1)
    wide = flexijax.CacheConfig(policy="full", page_size=1024, budget_tokens=2048)
    with pytest.raises(ValueError, match="page_size=1024 is longer than the 512 tokens"):
        flexijax.generate(lm, [[1]], max_new_tokens=1, cache=wide)


@pytest.mark.parametrize(
    ("requests", "limit", "batch"), [(5, 3, 2), (3, 8, 4), (1, 1, 1), (9, 8, 8), (4, 7, 4)]
)
def test_no_more_run_together_than_asked_for(requests, limit, batch):
    assert _batch(requests, limit) == batch


def test_the_smallest_top_p_still_keeps_the_best_token():
    rows = SamplingRows.of([flexijax.Sampling(temperature=1.0, top_p=1e-46)])
    weights = sampling_weights(jnp.array([[0.0, 3.0, 1.0]]), rows, filtered=True)
    assert (weights > 0).tolist() == [[False, True, False]]


def test_programs_used_longest_ago_go_when_memory_maps_run_short(monkeypatch):
    lm = tiny_model(num_layers=1)
    flexijax.generate(lm, [[1, 2]], max_new_tokens=2, cache=CACHE)
    before, maps = len(jit_cache._programs), iter([100, 100, 10])
    newest = list(jit_cache._programs)[-1]
    monkeypatch.setattr(jit_cache, "_max_memory_maps", lambda: 100)
    monkeypatch.setattr(jit_cache, "memory_maps", lambda: next(maps))
    jit_cache.make_room()
    assert 0 < len(jit_cache._programs) < before
    assert newest in jit_cache._programs


def test_closed_streams_read_as_empty_and_write_nowhere(repository):
    code = (
        "import sys; from flexijax.cli.terminal import mend_streams\n"
        "for name in ('stdin', 'stdout', 'stderr'): getattr(sys, name).close()\n"
        "mend_streams(); print('nowhere'); sys.exit(len(sys.stdin.read()))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=repository).returncode == 0


def test_a_terminal_that_lacks_characters_gets_escapes(repository):
    code = "from flexijax.cli.terminal import mend_streams\nmend_streams(); print('\u20ac')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, b"\\u20ac\n")
