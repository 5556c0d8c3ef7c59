"""Adaptive intervals with thresholds of one's own: they arrive, and bad ones are named."""

import pytest

from flexijax.config import CacheConfig
from flexijax.policies.adaptive import Adaptive


def test_an_object_is_taken_as_it_is():
    pace = Adaptive(shortest=4, longest=32, first=8, lengthen_at=0.7, shorten_at=0.2)
    config = CacheConfig(rerank_interval=pace)
    assert config.adaptive is pace
    assert config.chunk_steps == 4
    assert CacheConfig(rerank_interval="adaptive").adaptive == Adaptive()
    assert (CacheConfig().adaptive, CacheConfig().chunk_steps) == (None, 16)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shortest": 0}, "shortest=0 of Adaptive must be a positive integer"),
        ({"longest": 8.0}, "longest=8.0 of Adaptive must be a positive integer"),
        ({"first": True}, "first=True of Adaptive must be a positive integer"),
        ({"first": 24}, "first=24 of Adaptive must be a power of two times shortest=8"),
        ({"longest": 60}, "longest=60 of Adaptive must be a power of two times shortest=8"),
        ({"first": 128}, "first=128 .* at most longest=64"),
        ({"shortest": 128}, "shortest=128 .* at most longest=64"),
        ({"lengthen_at": 0.2, "shorten_at": 0.4}, "shorten_at=0.4 .* at most lengthen_at=0.2"),
    ],
)
def test_what_cannot_work_is_named(values, words):
    with pytest.raises(ValueError, match=words):
        Adaptive(**values)
