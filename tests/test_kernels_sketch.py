"""Sketches of keys: their format and their scores, on the shared cases, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch, lanes, sketches
from flexijax.pallas_kernels.page_selection.xla import page_ranks
from flexijax.pallas_kernels.queries import HeadQueries, grouped
from flexijax.pallas_kernels.sketch_query import reference as query_reference
from flexijax.pallas_kernels.sketch_scores import reference
from flexijax.pallas_kernels.sketches import SPACING, SketchCode, SketchQuery
from flexijax.policies.page_score import PageTable
from flexijax.policies.sketch import Sketch
from tests.kernel_cases import SKETCH_CASES, assert_numbers_close, sketch_inputs


def query_of(inputs) -> SketchQuery:
    return SketchQuery(*(jnp.asarray(inputs.pop(n)) for n in ("weights", "offset", "unit")))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("case", SKETCH_CASES, ids=str)
def test_scores(case, implementation):
    inputs = sketch_inputs(case)
    expected = reference.sketch_scores(**inputs, page_size=case.page)
    run = functools.partial(
        dispatch.sketch_scores, page_size=case.page, implementation=implementation
    )
    scores = jax.jit(run)(query_of(inputs), **{n: jnp.asarray(x) for n, x in inputs.items()})
    assert scores.dtype == jnp.float32
    assert_numbers_close(scores, expected, 1e-5)


@pytest.mark.parametrize("case", SKETCH_CASES, ids=str)
def test_zeros_would_fail(case):
    expected = reference.sketch_scores(**sketch_inputs(case), page_size=case.page)
    with pytest.raises(AssertionError):
        assert_numbers_close(np.zeros_like(expected), expected, 1e-5)
    # Nor would scores that ignored the codes pass.
    finite = expected[..., 0][np.isfinite(expected[..., 0])]
    assert expected.shape[-1] < 4 or np.nanstd(expected[np.isfinite(expected)]) > 0.05
    assert len(finite) or max(case.lengths) < case.page


def keys_of(pages, heads, page, width, seed=0):
    """Keys with outlier channels and means far from zero: [P, K, page, H]."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=(heads, 1, width)))
    middle = 3 * rng.normal(size=(heads, 1, width))
    return (rng.normal(size=(pages, heads, page, width)) * spread + middle).astype(np.float32)


@pytest.mark.parametrize("bits", sorted(SPACING))
@pytest.mark.parametrize("width", [8, 64, 80])
def test_codes_are_the_nearest_levels(bits, width):
    pages, heads, page, length = 6, 2, 8, 43
    keys = keys_of(pages, heads, page, width)
    poisoned = keys.transpose(1, 0, 2, 3).reshape(heads, -1, width).copy()
    poisoned[:, length:] = np.nan
    poisoned = poisoned.reshape(heads, pages, page, width).transpose(1, 0, 2, 3)
    code = sketches.fit(jnp.asarray(poisoned), jnp.int32(length), bits=bits)
    codes = sketches.encode(jnp.asarray(keys), code, bits=bits)
    levels = reference.sketch_unpack(codes, width)
    assert codes.dtype == jnp.uint32
    for head in range(heads):
        flat = keys[:, head].reshape(-1, width)
        mean, step = reference.sketch_code(flat[:length], spacing=SPACING[bits])
        np.testing.assert_allclose(code.mean[head], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(code.step[head], step, rtol=1e-4)
        # By the very numbers that were used, so that nothing but a tie can differ.
        expected = reference.sketch_levels(flat, code.mean[head], code.step[head], bits=bits)
        assert (levels[:, head].reshape(-1, width) == expected).mean() > 0.999
        assert len(np.unique(expected)) == 2**bits


@pytest.mark.parametrize("width", [1, 4, 24, 64])
def test_rotation_is_orthogonal(width):
    x = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    rotated = sketches.rotate(jnp.asarray(x))
    np.testing.assert_allclose(rotated, x @ reference.hadamard(width), atol=1e-5)
    np.testing.assert_allclose(sketches.rotate(rotated), x, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_a_prepared_query_gives_the_products_with_the_levels():
    """Up to its rounding to 6 bits, half a unit for each channel's level."""
    bits, scale = 2, 0.125
    rng = np.random.default_rng(1)
    q = rng.normal(size=(1, 2, 3, 64)).astype(np.float32)
    mean = rng.normal(size=(1, 2, 64)).astype(np.float32)
    step = rng.uniform(0.5, 2, (1, 2, 64)).astype(np.float32)
    levels = rng.integers(0, 4, (2, 10, 64))
    query = sketches.prepare(
        jnp.asarray(q), SketchCode(jnp.asarray(mean), jnp.asarray(step)), bits=bits, scale=scale
    )
    weights = np.asarray(query.weights, np.float64)
    assert query.weights.dtype == jnp.int8 and np.abs(weights).max() == 31
    found = np.einsum("KGH,KSH->KGS", weights[0], levels) * np.asarray(query.unit)[0][..., None]
    found += np.asarray(query.offset)[0][..., None]
    keys = mean[0][:, None] + step[0][:, None] * (levels - 1.5)
    exact = scale * np.einsum("KGH,KSH->KGS", q[0] @ reference.hadamard(64), keys)
    allowed = 0.5 * np.asarray(query.unit)[0][..., None] * np.abs(levels - 1.5).sum(-1)[:, None]
    assert (np.abs(found - exact) <= allowed + 1e-4).all()
    assert np.abs(exact).max() > 10 * np.abs(found - exact).max()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("width", "group", "dtype"),
    [(64, 3, "float32"), (8, 1, "float32"), (80, 17, "float32"), (128, 4, "bfloat16")],
)
def test_a_query_is_rotated_and_rounded(width, group, dtype, implementation):
    """To the nearest whole weights, packed four to a word where a kernel does it."""
    bits, scale, batch, heads = 2, 0.125, 3, 2
    rng = np.random.default_rng(width)
    q = jnp.asarray(rng.normal(size=(batch, heads, group, width)), dtype)
    mean, step = rng.normal(size=(2, batch, heads, width)).astype(np.float32)
    code = SketchCode(jnp.asarray(mean), jnp.asarray(np.abs(step) + 0.1))
    run = functools.partial(
        dispatch.sketch_query, bits=bits, scale=scale, implementation=implementation
    )
    found = jax.jit(run)(q, code)
    weights, offset, unit = query_reference.sketch_query(
        np.asarray(q, np.float32), mean, np.asarray(code.step), bits=bits, scale=scale
    )
    np.testing.assert_allclose(found.unit, unit, rtol=1e-5)
    expected = lanes.pack(jnp.asarray(np.round(weights), jnp.int8))
    assert (lanes.packed(found.weights) == expected).all()
    # Of a sum of many terms, so within rounding of the terms, not of the sum.
    np.testing.assert_allclose(found.offset, offset, atol=1e-5 * width)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(("heads", "rows"), [((3, 1), 12), ((0, 2), 13)], ids=str)
def test_a_query_is_read_where_it_lies(heads, rows, implementation):
    """Among rows of NaN, in the order of the named heads; the last rows are of no head."""
    group, width, batch = 3, 32, 2
    rng = np.random.default_rng(rows)
    q = rng.normal(size=(batch, len(heads), group, width)).astype(np.float32)
    every = np.full((batch, rows, width), np.nan, np.float32)
    for at, head in enumerate(heads):
        every[:, head * group : (head + 1) * group] = q[:, at]
    queries = HeadQueries(jnp.asarray(every), heads, group)
    assert queries.shape == q.shape
    np.testing.assert_array_equal(grouped(queries), q)
    code = SketchCode(*jnp.asarray(np.abs(rng.normal(size=(2, batch, len(heads), width)) + 0.1)))
    run = functools.partial(dispatch.sketch_query, bits=2, scale=0.2, implementation=implementation)
    found = jax.jit(run)(queries, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), code))
    weights, offset, unit = query_reference.sketch_query(
        q, np.asarray(code.mean), np.asarray(code.step), bits=2, scale=0.2
    )
    np.testing.assert_allclose(found.unit, unit, rtol=1e-5)
    expected = lanes.pack(jnp.asarray(np.round(weights), jnp.int8))
    assert (lanes.packed(found.weights) == expected).all()
    np.testing.assert_allclose(found.offset, offset, atol=1e-5 * width)
    with pytest.raises(ValueError, match="do not lie in"):
        run(HeadQueries(queries.rows, (0, 4), group), code)


@pytest.mark.parametrize(("bits", "least"), [(1, 0.75), (2, 0.9), (4, 0.98)])
def test_a_sketch_scores_as_attention_would(bits, least):
    """Correlation with the true scores over pages, growing with the bits."""
    pages, heads, page, width, scale = 40, 2, 16, 64, 0.05
    rng = np.random.default_rng(3)
    # Pages differ, as those of a text do.
    keys = keys_of(pages, heads, page, width) + rng.normal(size=(pages, heads, 1, width))
    keys = keys.astype(np.float32)
    q = np.random.default_rng(2).normal(size=(1, heads, 3, width)).astype(np.float32)
    score = Sketch(bits)
    length = jnp.int32(pages * page)
    state = score.fit(jnp.asarray(keys), length)
    found = score.scores(
        jnp.asarray(q),
        score.summarize(jnp.asarray(keys), state),
        jax.tree.map(lambda leaf: leaf[None], state),
        PageTable.of_full_pages(jnp.arange(pages, dtype=jnp.int32)[None], length[None], page),
        scale=scale,
        implementation=None,
    )
    products = scale * np.einsum("kgh,pksh->kgps", q[0].astype(np.float64), keys)
    logits = np.log(np.exp(products).sum(-1))
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    truth = np.log(shares.mean(1))
    ranks = page_ranks(found)
    for head in range(heads):
        assert np.corrcoef(ranks[0, head], truth[head])[0, 1] > least


def bad_calls():
    inputs = sketch_inputs(SKETCH_CASES[0])
    query = query_of(inputs)
    codes, rest = inputs.pop("codes"), inputs

    def call(query=query, codes=codes, page_size=16, **changes):
        return dispatch.sketch_scores(query, codes, **{**rest, **changes}, page_size=page_size)

    return {
        "bits": (
            lambda: call(codes=np.repeat(codes, 2, 2)[:, :, :3]),
            r"one of \(1, 2, 4\), got 3",
        ),
        "words": (lambda: call(codes=codes[:, :, :, :1]), r"codes.*but 2 is 2"),
        "page": (lambda: call(page_size=8), r"codes.*but 8 is 8"),
        "codes": (lambda: call(codes=codes.astype(np.int32)), r"codes must be uint32"),
        "heads": (lambda: call(codes=codes[:, :1]), r"K is 2 as in weights"),
        "weights": (
            lambda: call(SketchQuery(query.offset[..., None], query.offset, query.unit)),
            r"codes|weights must be int8",
        ),
        "lengths": (lambda: call(lengths=np.zeros(7)), r"lengths must be int32"),
        "name": (lambda: call(implementation="cuda"), r"implementation must be None or one of"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
