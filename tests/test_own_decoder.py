"""A decoder that is not ours through the cache: the same tokens as its own attention gives."""

import numpy as np
import pytest

import flexijax
from examples import own_decoder
from flexijax import policies
from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program


@pytest.fixture(scope="module")
def lm() -> flexijax.LanguageModel:
    return own_decoder.language_model()


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    return np.random.default_rng(7).integers(0, own_decoder.VOCAB, 90).tolist()


@pytest.fixture(scope="module")
def profile() -> flexijax.HeadProfile:
    """A layer with both kinds of heads, and one with stable heads only."""
    return flexijax.HeadProfile(
        model="own decoder",
        num_layers=own_decoder.LAYERS,
        num_kv_heads=own_decoder.KV_HEADS,
        unstable=((0, 1),),
        page_size=8,
        budget_pages=16,
        source="by hand",
    )


@pytest.fixture(scope="module")
def dense(lm, prompt) -> list[int]:
    return own_decoder.greedy_densely(lm, prompt, 40)


def config(profile, **changes):
    return CacheConfig(page_size=8, rerank_interval=8, profile=profile, **changes)


@pytest.mark.parametrize("policy", policies.names())
def test_tokens_equal_the_models_own_attention(policy, lm, prompt, profile, dense):
    cache = config(profile, policy=policy, budget_tokens=256)
    out = flexijax.generate(lm, [prompt], max_new_tokens=40, cache=cache)
    assert list(out[0].token_ids) == dense


def test_agreement_counts_choices_on_a_given_text(lm, prompt, profile, dense):
    """All of its own choices, and none of tokens that it never chose."""
    cache = config(profile, budget_tokens=256)
    program = make_program(lm, cache, max_tokens=len(prompt) + 24, max_new_tokens=24)
    shared = read(lm, [program], prompt)
    assert Continuation(lm, program, shared).agreeing(dense[:19]) == 19
    other = [(token + 1) % own_decoder.VOCAB for token in dense[:1]]
    assert Continuation(lm, program, shared).agreeing(other) == 0


def test_a_small_budget_keeps_less_on_the_device(lm, prompt, profile):
    cache = config(profile, budget_tokens=32)
    out = flexijax.generate(lm, [prompt], max_new_tokens=40, cache=cache)[0]
    assert len(out.token_ids) == 40
    assert out.metrics.device_kv_bytes - out.metrics.summary_bytes < out.metrics.full_kv_bytes
    assert out.metrics.host_kv_bytes > 0 and out.metrics.reranks > 0
