"""One reading of a prompt in the caches of several programs, and what each says after it."""

import dataclasses

import numpy as np
import pytest

import flexijax
from flexijax.config import MODES
from flexijax.engine.continuation import Continuation, read
from flexijax.generate import make_program
from tests.tiny_models import tiny_model

PAGE, STEPS, TOKENS = 4, 8, 24
PROMPT = np.random.default_rng(3).integers(0, 97, 61).tolist()
PROFILE = flexijax.HeadProfile(
    model="tiny-llama",
    num_layers=2,
    num_kv_heads=2,
    unstable=((0, 1),),
    page_size=PAGE,
    budget_pages=4,
    source="by hand",
)


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module")
def config():
    return flexijax.CacheConfig(page_size=PAGE, budget_tokens=4 * PAGE, rerank_interval=STEPS)


@pytest.fixture(scope="module")
def made(lm, config):
    """A program per mode, all for the same number of tokens; "flexi" in a batch of two."""
    return {
        mode: make_program(
            lm,
            dataclasses.replace(config, mode=mode),
            profile=PROFILE,
            max_tokens=len(PROMPT) + TOKENS,
            rows=2 if mode == "flexi" else 1,
        )
        for mode in MODES
    }


@pytest.fixture(scope="module")
def reading(lm, made):
    return read(lm, made["full"], PROMPT)


@pytest.mark.parametrize("mode", MODES)
def test_every_program_says_what_generate_says(mode, lm, config, made, reading):
    cache = dataclasses.replace(config, mode=mode)
    out = flexijax.generate(
        lm, [PROMPT], max_new_tokens=TOKENS, cache=cache, profile=PROFILE, max_batch=1
    )[0]
    greedy = Continuation(lm, made[mode], reading)
    said = greedy.greedy(STEPS) + greedy.greedy(TOKENS - STEPS)
    assert said == list(out.token_ids)

    fed = Continuation(lm, made[mode], reading)
    first = fed.first_logits.argmax()
    logits = np.concatenate([fed.feed(said[:STEPS]), fed.feed(said[STEPS:])])
    assert [first, *logits.argmax(-1)[:-1]] == said
    assert logits.shape == (TOKENS, lm.vocab_size)
    # All were promoted in as many reranks, of which generate needs one less for its last token.
    assert fed.promoted == greedy.promoted >= out.metrics.promoted_pages
    assert (fed.promoted > 0) == (mode == "flexi")
    assert fed.length == greedy.length == len(PROMPT) + TOKENS


def test_feeding_and_greed_may_take_turns(lm, made, reading):
    greedy = Continuation(lm, made["flexi"], reading)
    said = greedy.greedy(TOKENS)
    mixed = Continuation(lm, made["flexi"], reading)
    mixed.feed(said[:STEPS])
    assert mixed.greedy(TOKENS - STEPS) == said[STEPS:]


def test_what_does_not_fit_is_refused_by_name(lm, config, made, reading):
    with pytest.raises(ValueError, match="0 tokens, it must have 1 to"):
        read(lm, made["full"], [])
    fed = Continuation(lm, made["full"], reading)
    with pytest.raises(ValueError, match="9 tokens are not whole chunks of rerank_interval=8"):
        fed.feed([1] * 9)
    with pytest.raises(ValueError, match="0 tokens are not whole"):
        fed.greedy(0)
    with pytest.raises(ValueError, match=r"61 \+ 800 tokens are more than the cache's"):
        fed.greedy(800)

    for change in ({"page_size": 8}, {"dtype": "bfloat16"}):
        other = dataclasses.replace(config, mode="full", **change)
        program = make_program(lm, other, profile=None, max_tokens=85, rows=1)
        with pytest.raises(ValueError, match=f"a prompt read with {next(iter(change))}="):
            Continuation(lm, program, reading)
    stranger = dataclasses.replace(made["full"], decoder=tiny_model(rope_theta=1e3).decoder)
    with pytest.raises(ValueError, match="by one decoder cannot be continued by another"):
        Continuation(lm, stranger, reading)
