"""Law 4 for kept minima and maxima: whatever the keys, rounding never turns a bound into less."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexijax.config import CacheConfig
from flexijax.engine.plan import make_program
from flexijax.pallas_kernels import summaries
from flexijax.policies.minmax import MinMax
from flexijax.policies.page_score import PageTable
from flexijax.policies.quest import Quest
from tests.tiny_models import tiny_model

PAGE, WIDTH = 4, 40  # five groups of eight channels share an exponent each
# float32 keys, magnitudes that a float32 product can still hold.
NUMBERS = st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False)
EDGES = st.sampled_from(
    [0.0, 1.0, -1.0, 127.0, 127.5, 128.0, -128.0, -127.0, 63.5, 2.0**-40, 65504.0, 65520.0, 1e9]
)
KEYS = st.lists(NUMBERS | EDGES, min_size=PAGE * WIDTH, max_size=PAGE * WIDTH)
OUTLIER = [1e-6] * (PAGE * WIDTH - 1) + [1e12]
DTYPES = ["float32", "bfloat16", "float16"]


def page_of(numbers, dtype):
    """The numbers as one page of one head in `dtype`, and what they came to, in float64."""
    largest = 65504.0 if dtype == "float16" else np.inf
    tiny = 2.0**-14 if dtype == "float16" else 0.0  # subnormal numbers may be taken for zero
    numbers = np.clip(np.asarray(numbers, np.float64), -largest, largest)
    numbers = np.where(np.abs(numbers) < tiny, 0.0, numbers)
    keys = jnp.asarray(numbers.reshape(1, 1, PAGE, WIDTH), dtype)
    return keys, np.asarray(keys.astype(jnp.float32), np.float64)[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
@settings(max_examples=60, deadline=None)
@given(numbers=KEYS, query=st.integers(0, 2**32 - 1))
@example(numbers=OUTLIER, query=0)
@example(numbers=[0.0] * (PAGE * WIDTH), query=1)
@example(numbers=[127.0, -128.0, 127.00001, 63.5] * (PAGE * WIDTH // 4), query=2)
def test_bounds_hold_for_any_keys(dtype, kept, numbers, query):
    keys, exact = page_of(numbers, dtype)
    score = MinMax(kept)
    found = score.summarize(keys)
    low, high = np.asarray(summaries.dequantize(found), np.float64)[0, 0]
    assert (low <= exact.min(0)).all() and (high >= exact.max(0)).all()
    assert np.isfinite(low).all() and np.isfinite(high).all()

    q = np.random.default_rng(query).normal(size=(1, 1, 2, WIDTH)).astype(np.float32)
    got = score.scores(
        jnp.asarray(q),
        found,
        (),
        PageTable.of_full_pages(jnp.zeros((1, 1), jnp.int32), jnp.asarray([PAGE], jnp.int32), PAGE),
        scale=1.0,
        implementation="xla",
    )
    products = q[0, 0].astype(np.float64) @ exact.T  # [G, page]
    # Of the float32 sum itself: its terms are as large as the bounds that it adds.
    terms = np.abs(q[0, 0]).astype(np.float64) @ np.maximum(np.abs(low), np.abs(high))
    # And terms below what float32 holds as normal numbers may count as zero.
    lost = 1e-5 * terms + 2 * WIDTH * float(np.finfo(np.float32).tiny)
    assert float(got[0, 0, 0, 0]) >= (products.max(-1) - lost).max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_close(dtype):
    """Not any bound: 8 bits are off by two steps of their group at most, 16 by a rounding."""
    rng = np.random.default_rng(0)
    keys, exact = page_of(rng.normal(size=PAGE * WIDTH), dtype)
    ends = np.stack([exact.min(0), exact.max(0)])
    for kept, allowed in (("int8", 2 / 64), ("bfloat16", 2**-7)):
        found = np.asarray(summaries.dequantize(MinMax(kept).summarize(keys)), np.float64)[0, 0]
        size = np.abs(ends).reshape(2, -1, 8).max(-1).repeat(8, -1)
        assert (np.abs(found - ends) <= allowed * size).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float16_summaries_of_wider_keys_are_refused(dtype):
    """A key of 70,000 would have the bound infinity, and 0 times that is no number."""
    assert np.isinf(np.asarray(jnp.float32(70000.0).astype(jnp.float16)))
    lm, policy = tiny_model(), Quest(MinMax("float16"))
    with pytest.raises(ValueError, match=f"dtype='float16' end at 65504, and keys in {dtype} do"):
        make_program(lm, CacheConfig(policy=policy, dtype=dtype), max_tokens=64)
    layout = make_program(lm, CacheConfig(policy=policy, dtype="float16"), max_tokens=64).layout
    assert [group.score for *_, group in layout.all_groups()] == [MinMax("float16")] * 2
