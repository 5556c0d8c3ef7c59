"""CacheConfig: what it derives, and that a value that could not work never gets past it."""

from dataclasses import FrozenInstanceError, replace

import jax.numpy as jnp
import pytest

from flexijax.config import CacheConfig
from flexijax.policies.intervals import Adaptive


def test_defaults_are_those_of_the_paper():
    config = CacheConfig()
    assert (config.mode, config.page_size, config.rerank_interval) == ("flexi", 16, 16)
    assert (config.budget_pages, config.tail_pages) == (64, 1)


@pytest.mark.parametrize(
    ("page_size", "rerank_interval", "tail_pages"),
    [(16, 1, 1), (16, 15, 1), (16, 16, 1), (16, 17, 2), (16, 64, 4), (4, 16, 4)],
)
def test_tail_holds_every_page_that_begins_between_reranks(page_size, rerank_interval, tail_pages):
    config = CacheConfig(page_size=page_size, rerank_interval=rerank_interval)
    begun = max(
        sum((start + step) % page_size == 0 for step in range(rerank_interval))
        for start in range(page_size)
    )
    assert config.tail_pages == tail_pages == begun


def test_adaptive_intervals_have_a_tail_for_the_longest():
    config = CacheConfig(rerank_interval="adaptive")
    assert config.intervals is not None
    assert (config.chunk_steps, config.intervals.longest, config.tail_pages) == (8, 64, 4)
    assert (CacheConfig().intervals, CacheConfig().chunk_steps) == (None, 16)


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
    pace = Adaptive(lengthen_at=0.6, shorten_at=0.5)
    following = pace.following(jnp.array([[interval]]), jnp.array([[rco]]))
    assert following.tolist() == [[expected]] and following.dtype == jnp.int32


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "Flexi"}, ["mode='Flexi'", "'flexi', 'quest', 'full'"]),
        ({"page_size": 0}, ["page_size=0", "positive integer"]),
        ({"page_size": 12, "budget_tokens": 120}, ["page_size=12", "power of two"]),
        ({"page_size": 16.0}, ["page_size=16.0", "positive integer"]),
        ({"page_size": True}, ["page_size=True", "positive integer"]),
        ({"budget_tokens": -16}, ["budget_tokens=-16", "positive integer"]),
        ({"budget_tokens": 1000}, ["budget_tokens=1000", "page_size=16", "992", "1008"]),
        ({"budget_tokens": 8}, ["budget_tokens=8", "multiple", "such as 16"]),
        ({"budget_tokens": 16}, ["budget_tokens=16", "at least 2 pages", "32"]),
        ({"rerank_interval": 0}, ["rerank_interval=0", "positive integer"]),
        ({"rerank_interval": "adapted"}, ["rerank_interval='adapted'", "integer or 'adaptive'"]),
        ({"dtype": "float64"}, ["dtype='float64'", "'bfloat16'"]),
        ({"summary_dtype": "int4"}, ["summary_dtype='int4'", "'int8'"]),
        ({"score": "sketch3"}, ["score='sketch3'", "'minmax'", "'sketch2'"]),
        ({"summary_dtype": "int8"}, ["summary_dtype='int8'", "score='minmax'", "'sketch2'"]),
        ({"implementation": "cuda"}, ["implementation='cuda'", "'xla', 'pallas', 'triton'"]),
        ({"transfer": "copy"}, ["transfer='copy'", "'zero_copy', 'staged'"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError) as caught:
        CacheConfig(**values)
    assert [word for word in words if word not in str(caught.value)] == []


def test_is_a_value():
    """It is a static argument of jit: equal values share one compilation, changed ones do not."""
    config = CacheConfig(budget_tokens=512)
    assert hash(config) == hash(CacheConfig(budget_tokens=512))
    assert config != replace(config, budget_tokens=256)
    with pytest.raises(FrozenInstanceError):
        setattr(config, "mode", "full")  # noqa: B010 (an attribute assignment is a type error)
    with pytest.raises(ValueError, match="budget_tokens"):
        replace(config, page_size=1024)
