"""One reading of a prompt in the caches of several programs, and what each says after it."""

import dataclasses

import numpy as np
import pytest

import flexijax
from flexijax import policies
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from tests.dropping import DROPPING
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("short_chunks")

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


# Of those that are much alike one is enough; default windows are more than these budgets.
NAMES = set(policies.names()) - {"a2sf", "kvcrush", "treekv", "compresskv"}
POLICIES = {name: DROPPING.get(name, name) for name in sorted(NAMES)}


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module")
def config():
    return flexijax.CacheConfig(
        page_size=PAGE, budget_tokens=4 * PAGE, rerank_interval=STEPS, profile=PROFILE
    )


@pytest.fixture(scope="module")
def made(lm, config):
    """A program per policy, all for the same number of tokens; "flexi" in a batch of two."""
    return {
        name: make_program(
            lm,
            dataclasses.replace(config, policy=policy),
            max_tokens=len(PROMPT) + TOKENS,
            max_new_tokens=TOKENS,
            batch=2 if name == "flexi" else 1,
        )
        for name, policy in POLICIES.items()
    }


@pytest.fixture(scope="module")
def reading(lm, made):
    """One reading for all of them, whatever each observes of the prompt."""
    return read(lm, list(made.values()), PROMPT)


@pytest.mark.parametrize("name", POLICIES)
def test_every_program_says_what_generate_says(name, lm, config, made, reading):
    cache = dataclasses.replace(config, policy=POLICIES[name])
    out = flexijax.generate(lm, [PROMPT], max_new_tokens=TOKENS, cache=cache, max_batch=1)[0]
    greedy = Continuation(lm, made[name], reading)
    said = greedy.greedy(STEPS) + greedy.greedy(TOKENS - STEPS)
    assert said == list(out.token_ids)

    fed = Continuation(lm, made[name], reading)
    first = fed.first_logits.argmax()
    logits = np.concatenate([fed.feed(said[:STEPS]), fed.feed(said[STEPS:])])
    assert [first, *logits.argmax(-1)[:-1]] == said
    assert logits.shape == (TOKENS, lm.vocab_size)
    # All were promoted in as many reranks, of which generate needs one less for its last token.
    assert fed.stats == greedy.stats
    assert fed.stats.promoted_pages >= out.metrics.promoted_pages
    assert (fed.stats.promoted_pages > 0) == (name == "flexi")
    assert fed.stats.chunks == TOKENS // STEPS
    evicts = name in DROPPING or name == "razor_attention"
    assert (fed.stats.evicted_tokens > 0) == (out.metrics.evicted_tokens > 0) == evicts
    assert fed.length == greedy.length == len(PROMPT) + TOKENS


def test_feeding_and_greed_may_take_turns(lm, made, reading):
    greedy = Continuation(lm, made["flexi"], reading)
    said = greedy.greedy(TOKENS)
    mixed = Continuation(lm, made["flexi"], reading)
    mixed.feed(said[:STEPS])
    assert mixed.greedy(TOKENS - STEPS) == said[STEPS:]


def test_what_does_not_fit_is_refused_by_name(lm, config, made, reading):
    with pytest.raises(ValueError, match="0 tokens, it must have 1 to"):
        read(lm, [made["full"]], [])
    fed = Continuation(lm, made["full"], reading)
    with pytest.raises(ValueError, match="9 tokens are not whole chunks of rerank_interval=8"):
        fed.feed([1] * 9)
    with pytest.raises(ValueError, match="0 tokens are not whole"):
        fed.greedy(0)
    with pytest.raises(ValueError, match=r"61 \+ 800 tokens are more than the cache's"):
        fed.greedy(800)

    for change, field in (
        ({"dtype": "bfloat16"}, "dtype"),
        ({"page_size": 32, "budget_tokens": 64}, "tokens"),
    ):
        other = dataclasses.replace(config, policy="full", **change)
        program = make_program(lm, other, max_tokens=85)
        with pytest.raises(ValueError, match=f"a prompt read with {field}="):
            Continuation(lm, program, reading)
    stranger = dataclasses.replace(made["full"], decoder=tiny_model(rope_theta=1e3).decoder)
    with pytest.raises(ValueError, match="by one decoder cannot be continued by another"):
        Continuation(lm, stranger, reading)


def test_what_was_not_observed_is_refused_by_name(lm, made):
    """A reading holds what its programs asked for; another policy may need more of the prompt."""
    plain = read(lm, [made["full"]], PROMPT)
    for name in ("snapkv", "h2o"):
        with pytest.raises(ValueError, match=r"observes queries that were not kept: name its prog"):
            Continuation(lm, made[name], plain)
    Continuation(lm, made["streaming_llm"], plain)


def test_programs_that_cannot_share_a_reading_are_refused_by_name(lm, config, made):
    wide = dataclasses.replace(config, policy="full", dtype="bfloat16")
    with pytest.raises(ValueError, match="one reading of a prompt serves programs of one model"):
        read(lm, [made["full"], make_program(lm, wide, max_tokens=85)], PROMPT)
