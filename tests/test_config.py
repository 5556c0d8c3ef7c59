"""CacheConfig: what it derives, and that a value that could not work never gets past it."""

from dataclasses import FrozenInstanceError, replace

import jax.numpy as jnp
import pytest

from flexijax import policies
from flexijax.cache.layout import slots_of
from flexijax.config import CacheConfig
from flexijax.engine.plan import make_layout
from flexijax.models.config import AttentionShape
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from flexijax.policies.sketch import Sketch

STABLE = Flexi(unstable=((),))  # of one layer


def tail_pages(config):
    """Slots of a stable head beyond its budget, in a context that is longer than both."""
    layout = make_layout(
        replace(config, policy=STABLE),
        AttentionShape(1, 2, 1, 8, 1.0),
        profile=None,
        dtype="float32",
        max_tokens=2**14,
        max_new_tokens=16,
        batch=1,
    )
    ((group,),) = layout.groups
    assert group.room == config.budget_pages
    return slots_of(group, layout.sizes) - config.budget_pages


def test_defaults_are_those_of_the_paper():
    config = CacheConfig()
    assert (config.policy, config.page_size, config.rerank_interval) == ("flexi", 16, 16)
    assert (config.budget_pages, tail_pages(config)) == (64, 1)
    assert config.find_policy() == Flexi(score=Sketch(2))


def test_a_policy_is_found_by_its_name():
    assert set(policies.names()) >= {"flexi", "full", "quest", "streaming_llm", "snapkv", "h2o"}
    for name in policies.names():
        assert CacheConfig(policy=name).find_policy().name == name
    own = Flexi(score=MinMax("int8"))
    assert CacheConfig(policy=own).find_policy() is own


@pytest.mark.parametrize(
    ("page_size", "rerank_interval", "tail"),
    [(16, 1, 1), (16, 15, 1), (16, 16, 1), (16, 17, 2), (16, 64, 4), (4, 16, 4)],
)
def test_tail_holds_every_page_that_begins_between_reranks(page_size, rerank_interval, tail):
    config = CacheConfig(page_size=page_size, rerank_interval=rerank_interval)
    begun = max(
        sum((start + step) % page_size == 0 for step in range(rerank_interval))
        for start in range(page_size)
    )
    assert tail_pages(config) == tail == begun


def test_adaptive_intervals_have_a_tail_for_the_longest():
    config = CacheConfig(rerank_interval="adaptive")
    assert config.adaptive is not None
    assert (config.chunk_steps, config.adaptive.longest, tail_pages(config)) == (8, 64, 4)
    assert (CacheConfig().adaptive, CacheConfig().chunk_steps) == (None, 16)


@pytest.mark.parametrize(
    ("rco", "interval", "expected"),
    [
        (0.9, 8, 16),
        (0.9, 64, 64),
        (0.1, 64, 32),
        (0.1, 8, 8),
        (0.55, 32, 32),
        (float("nan"), 16, 16),
    ],
)
def test_an_interval_follows_what_the_head_keeps(rco, interval, expected):
    adaptive = Adaptive(lengthen_at=0.6, shorten_at=0.5)
    following = adaptive.following(jnp.array([[interval]]), jnp.array([[rco]]))
    assert following.tolist() == [[expected]] and following.dtype == jnp.int32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "Flexi"}, ["policy='Flexi'", "'flexi', 'full'", "'quest'", "Policy object"]),
        ({"policy": None}, ["policy=None", "a name or a Policy object"]),
        ({"policy": Flexi}, ["policy=<class", "a name or a Policy object"]),
        ({"policy": "base"}, ["policy='base'", "'flexi', 'full'"]),
        ({"policy": "minmax"}, ["policy='minmax'", "'flexi', 'full'"]),
        ({"profile": 1}, ["profile=1", "None, a name or a HeadProfile"]),
        ({"page_size": 0}, ["page_size=0", "positive integer"]),
        ({"page_size": 12, "budget_tokens": 120}, ["page_size=12", "power of two"]),
        ({"page_size": 16.0}, ["page_size=16.0", "positive integer"]),
        ({"page_size": True}, ["page_size=True", "positive integer"]),
        ({"budget_tokens": -16}, ["budget_tokens=-16", "positive integer"]),
        ({"budget_tokens": 1000}, ["budget_tokens=1000", "page_size=16", "992", "1008"]),
        ({"budget_tokens": 8}, ["budget_tokens=8", "at least 2 pages", "32"]),
        ({"budget_tokens": 16}, ["budget_tokens=16", "at least 2 pages", "32"]),
        ({"rerank_interval": 0}, ["rerank_interval=0", "positive integer"]),
        ({"rerank_interval": "adapted"}, ["rerank_interval='adapted'", "integer or 'adaptive'"]),
        ({"dtype": "float64"}, ["dtype='float64'", "'bfloat16'"]),
        ({"implementation": "cuda"}, ["implementation='cuda'", "'xla', 'pallas', 'triton'"]),
        ({"transfer": "copy"}, ["transfer='copy'", "'zero_copy', 'staged'"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError) as caught:
        CacheConfig(**values)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("score", "value", "words"),
    [
        (MinMax, "int4", ["dtype='int4'", "MinMax", "'int8'"]),
        (MinMax, "float64", ["dtype='float64'", "'bfloat16'"]),
        (Sketch, 3, ["bits=3", "(1, 2, 4)"]),
        (Sketch, 0, ["bits=0"]),
    ],
)
def test_bad_page_scores_are_named(score, value, words):
    with pytest.raises(ValueError) as caught:
        score(value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_is_a_value():
    """It is a static argument of jit: equal values share one compilation, changed ones do not."""
    config = CacheConfig(budget_tokens=512)
    assert hash(config) == hash(CacheConfig(budget_tokens=512))
    assert config != replace(config, budget_tokens=256)
    with pytest.raises(FrozenInstanceError):
        setattr(config, "policy", "full")  # noqa: B010 (an attribute assignment is a type error)
    with pytest.raises(ValueError, match="budget_tokens"):
        replace(config, page_size=1024)
