"""A step's cost follows the rows that run: what runs is the smallest program that holds them."""

import dataclasses

import numpy as np
import pytest

import flexijax
from flexijax.engine.decode import decode_steps
from flexijax.engine.program import Runner
from tests.planted import words_tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import SMALL, prompt_of

ROWS = 5
# (prompt tokens, new tokens): so that one to five of them run.
REQUESTS = ((40, 60), (9, 28), (50, 31), (33, 45), (21, 24))
LOGPROBS = flexijax.Sampling(logprobs=True)
POLICIES = ("flexi", "h2o")


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(tiny_model(), tokenizer=words_tokenizer())


@pytest.fixture
def ran(monkeypatch):
    """The rows of every decode program that ran, and how many of them took part."""
    rows, run = [], Runner.run

    def watched(self, stage, function, static, args, donate=()):
        if function is decode_steps:
            active = args[-1].active
            rows.append((static.layout.sizes.batch, int(np.asarray(active).sum())))
        return run(self, stage, function, static, args, donate)

    monkeypatch.setattr(Runner, "run", watched)
    return rows


@pytest.mark.parametrize("policy", POLICIES)
def test_steps_are_of_as_many_rows_as_run_and_say_the_same(lm, policy, ran):
    """To the bit: whatever program a request's steps are part of."""
    cache = dataclasses.replace(SMALL, policy=policy)
    engine = flexijax.Engine(
        lm, cache=cache, max_requests=ROWS, max_context=128, prefill_first=True
    )
    prompts = [(prompt_of(length, seed=length), new) for length, new in REQUESTS]
    alone = []
    for prompt, new in prompts:
        alone.append(engine.submit(prompt, max_new_tokens=new, sampling=LOGPROBS).result())
    assert {count for count, _ in ran} == {2}
    ran.clear()
    streams = [
        engine.submit(prompt, max_new_tokens=new, sampling=LOGPROBS) for prompt, new in prompts
    ]
    while engine.step():
        pass
    counts = engine._core.runner.program.row_counts
    assert counts == (2, 4, 5)
    assert {count for count, _ in ran} == set(counts)
    assert all(count == min(of for of in counts if of >= took) for count, took in ran)
    for stream, wanted in zip(streams, alone, strict=True):
        made = stream.result()
        assert made.token_ids == wanted.token_ids
        assert made.logprobs == wanted.logprobs


def test_rows_that_are_one_array_have_one_program(lm):
    """Of generate, of one row, and of more rows than products have the same bits for."""
    for rows, cache in (
        (1, SMALL),
        (9, SMALL),
        (3, dataclasses.replace(SMALL, implementation="pallas")),
    ):
        engine = flexijax.Engine(lm, cache=cache, max_requests=rows, max_context=64)
        program = engine._core.runner.program
        assert program.row_counts == (rows,) and program.layout.sizes.banks == 1
