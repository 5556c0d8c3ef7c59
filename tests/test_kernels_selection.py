"""Page selection against its oracle: ranks, what is always attended, ties, free rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.page_selection import reference, xla

IMPLEMENTATIONS = ("xla", "pallas")


@functools.cache
def jitted(**static):
    return jax.jit(functools.partial(dispatch.select_pages, **static))


def inputs(seed, lengths, scored, *, group, pages, page_size, ties=False):
    """Scores, -inf from the first page on that has none."""
    rng = np.random.default_rng(seed)
    scores = 8 * rng.normal(size=(len(lengths), 2, group, pages)).astype(np.float32)
    if ties:
        scores = np.round(scores / 4) * 4 + np.float32(0)  # -0 is below 0
    for row, known in enumerate(scored):
        scores[row, ..., known // page_size :] = -np.inf
    return scores, np.array(lengths, np.int32), np.array(scored, np.int32)


def check(arrays, *, implementation, **static):
    found = np.asarray(jitted(implementation=implementation, **static)(*map(jnp.asarray, arrays)))
    static.setdefault("newer", 0)
    static.setdefault("sinks", 1)
    expected = reference.select_pages(*arrays, **static)
    pages = arrays[0].shape[-1]
    assert found.dtype == np.int32
    assert found.shape[2] == min(static["count"] + static["newer"], pages)
    for got_row, want_row in zip(found, expected, strict=True):
        for got, want in zip(got_row, want_row, strict=True):
            chosen = [page for page in got.tolist() if page >= 0]
            assert len(set(chosen)) == len(chosen)
            assert set(chosen) == want


LENGTHS = ((1, 16, 17, 65, 0), (1, 16, 17, 79, 100), (80, 33, 96, 97, 112))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_best_pages(lengths, group, implementation):
    scored = [max(0, length - 7) // 16 * 16 for length in lengths]
    arrays = inputs(1, lengths, scored, group=group, pages=7, page_size=16)
    for count, newer in ((1, 0), (3, 0), (2, 1), (5, 2), (7, 0), (64, 1)):
        check(arrays, implementation=implementation, count=count, newer=newer, page_size=16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equal_ranks_the_first(implementation):
    lengths = scored = (300, 128, 40)
    arrays = inputs(2, lengths, scored, group=1, pages=75, page_size=4, ties=True)
    for count in (4, 9, 30):
        check(arrays, implementation=implementation, count=count, page_size=4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_has_no_score_is_left_out(implementation):
    """A page of -inf is chosen by rule only, however much room there is."""
    scores = np.full((1, 1, 1, 8), -np.inf, np.float32)
    scores[..., 3] = -4.0
    at = np.array([8 * 16], np.int32)
    found = dispatch.select_pages(
        jnp.asarray(scores),
        jnp.asarray(at),
        jnp.asarray(at),
        count=6,
        page_size=16,
        sinks=2,
        implementation=implementation,
    )
    assert sorted(np.asarray(found)[0, 0].tolist()) == [-1, -1, 0, 1, 3, 7]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 130), min_size=3, max_size=3))
def test_any_scores(seed, lengths):
    rng = np.random.default_rng(seed)
    scored = [int(rng.integers(0, length + 1)) // 4 * 4 for length in lengths]
    arrays = inputs(seed, lengths, scored, group=2, pages=33, page_size=4)
    for implementation in IMPLEMENTATIONS:
        check(arrays, implementation=implementation, count=9, newer=3, page_size=4, sinks=2)


def test_ranks_by_hand():
    """Two query heads: shares 1/4, 3/4 and 1/2, 1/2 of two pages; a third page is not there."""
    logits = np.log([[[[1.0, 3.0, 1e-30], [5.0, 5.0, 1e-30]]]])
    logits[..., 2] = -np.inf
    found = xla.page_ranks(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found[0, 0, :2], np.log([3 / 8, 5 / 8]), rtol=1e-6)
    assert found[0, 0, 2] == -np.inf
    np.testing.assert_allclose(found[0, 0], reference.page_ranks(logits[0, 0]), rtol=1e-6)
    assert (np.asarray(xla.page_ranks(jnp.full((1, 1, 2, 3), -jnp.inf))) == -np.inf).all()
    one = jnp.asarray(logits[:, :, :1], jnp.float32)
    assert (xla.page_ranks(one) == one[:, :, 0]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"newer": -1}, "newer=-1"),
        ({"sinks": -2}, "sinks=-2"),
        ({"page_size": 12}, "page size must be a power of two"),
        ({"lengths": jnp.zeros(3, jnp.int32)}, "but B is 2"),
        ({"scored": jnp.zeros(2)}, "scored must be int32"),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments_are_named(changes, message):
    arrays = {
        "scores": jnp.zeros((2, 1, 1, 4)),
        "lengths": jnp.zeros(2, jnp.int32),
        "scored": jnp.zeros(2, jnp.int32),
    }
    with pytest.raises(ValueError, match=message):
        dispatch.select_pages(**{**arrays, "count": 2, "page_size": 16, **changes})
