"""The scheduler step: every implementation against lists and sets, on random cases."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from flexijax.pallas_kernels import dispatch_rerank
from flexijax.pallas_kernels.rerank import RerankStats
from flexijax.pallas_kernels.rerank_plan import reference

IMPLEMENTATIONS = ("xla", "pallas")
PAGE, BATCH, HEADS, ENTRIES = 4, 4, 3, 2
# n, S, P: with and without room beside what is chosen; none but the last is a power of two.
SIZES = {"small": (3, 5, 12), "odd": (21, 37, 90), "whole": (16, 16, 24)}


def rerank_inputs(sizes, rng, *, one_since=False):
    """Rows at all stages, some of them free; slots hold pages, reserved ones, gaps."""
    count, slots, pages = SIZES[sizes]
    heads = (BATCH, HEADS)
    lengths = np.where(rng.random(BATCH) < 0.2, 0, rng.integers(1, pages * PAGE + 1, BATCH))
    chosen, held = np.full((*heads, count), -1), np.full((*heads, slots), -1)
    for b, h in np.ndindex(*heads):
        begun = -(-int(lengths[b]) // PAGE)
        best = rng.permutation(begun)[:count]
        if begun and begun - 1 not in best:
            best[0] = begun - 1
        chosen[b, h, : len(best)] = rng.permutation(best)
        # Mostly what is chosen, as it is from one rerank to the next.
        kept = best[rng.random(len(best)) < rng.random()]
        others = np.setdiff1d(np.arange(pages), kept)
        named = np.concatenate([kept, rng.permutation(others)])[:slots]
        named = np.where(rng.random(len(named)) < 0.2, -1, named)
        held[b, h, : len(named)] = rng.permutation(named)
    table = rng.permutation(5 * BATCH * pages)[: BATCH * pages].reshape(BATCH, pages)
    for b in range(BATCH):
        table[b, -(-lengths[b] // PAGE) :] = 2**30  # is not to be read
    since = np.maximum(lengths[:, None] - rng.integers(0, 3 * PAGE, heads), 0)
    due = (rng.random(heads) < 0.8) & (lengths > 0)[:, None]
    if one_since:
        since, due = since[:, :1], lengths[:, None]
    whole = {name: rng.integers(0, 50, heads).astype(np.int32) for name in reference.STATS}
    sums = {name: rng.uniform(0, 9, heads).astype(np.float32) for name in ("overlap", "rco")}
    arrays = {
        "chosen": chosen,
        "slot_page": held,
        "lengths": lengths,
        "since": since,
        "due": due,
        "block_table": table,
        "filled_page": rng.integers(-1, pages, (BATCH, ENTRIES)),
    }
    return {name: x.astype(np.int32) for name, x in arrays.items()}, {**whole, **sums}


@functools.cache
def compiled(implementation):
    return jax.jit(
        functools.partial(dispatch_rerank.rerank, page_size=PAGE, implementation=implementation)
    )


def assert_as_the_reference(arrays, stats, implementation):
    slot_page, load, rco, counts = reference.rerank(**arrays, stats=stats, page_size=PAGE)
    found = compiled(implementation)(
        **{name: jnp.asarray(x) for name, x in arrays.items()},
        stats=RerankStats(**{name: jnp.asarray(x) for name, x in stats.items()}),
    )
    np.testing.assert_array_equal(found.slot_page, slot_page)
    np.testing.assert_array_equal(found.load, load)
    due = np.broadcast_to(arrays["due"], rco.shape) > 0
    # RCO divides by 1 - chance, which float32 knows the less precisely the nearer chance is to 1.
    np.testing.assert_allclose(np.asarray(found.rco)[due], rco[due], rtol=1e-5, atol=1e-5)
    for name, expected in counts.items():
        got = np.asarray(getattr(found.stats, name))
        assert got.dtype == stats[name].dtype
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        if got.dtype == np.int32:
            np.testing.assert_array_equal(got, expected)
    return load, due


@pytest.mark.parametrize("one_since", [False, True], ids=["a-head", "a-row"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_plans_equal_the_reference(implementation, sizes, one_since):
    moved = []

    @hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @hypothesis.given(seed=st.integers(0, 2**32 - 1))
    def check(seed):
        arrays, stats = rerank_inputs(sizes, np.random.default_rng(seed), one_since=one_since)
        load, due = assert_as_the_reference(arrays, stats, implementation)
        moved.append(((load >= 0).sum(), due.sum(), due.size))

    check()
    loads, due, heads = map(sum, zip(*moved, strict=True))
    assert loads > due / 2 and 0 < due < heads, "nothing moved, so nothing was tested"


def bad_calls():
    arrays, stats = rerank_inputs("small", np.random.default_rng(0))

    def call(implementation=None, **changes):
        changed = {**arrays, **changes}
        counts = RerankStats(**{name: changed.pop(name, x) for name, x in stats.items()})
        return dispatch_rerank.rerank(
            **changed, stats=counts, page_size=PAGE, implementation=implementation
        )

    return {
        "heads": (lambda: call(slot_page=arrays["slot_page"][:, 1:]), r"K is 3 as in chosen"),
        "due": (lambda: call(due=arrays["due"] > 0), r"due must be int32"),
        "since": (lambda: call(since=arrays["since"][:, :2]), r"since\[B, K\].*K is 3"),
        "table": (lambda: call(block_table=arrays["block_table"][1:]), r"B is 4 as in chosen"),
        "sum": (lambda: call(overlap=stats["reranks"]), r"stats.overlap must be float32"),
        "name": (lambda: call(implementation="cuda"), r"implementation must be None or one of"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
