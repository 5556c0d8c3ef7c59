"""Every implementation of every kernel on the shared cases, against float64 NumPy.

Where there is a GPU, Pallas runs compiled; elsewhere in interpret mode.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.page_scores import reference as score_reference
from flexijax.pallas_kernels.sparse_decode import pallas as pallas_decode
from flexijax.pallas_kernels.sparse_decode import reference
from flexijax.pallas_kernels.sparse_decode.tuning import TuningConfig
from flexijax.pallas_kernels.summaries import QuantizedSummaries, group_size
from tests.kernel_cases import (
    DECODE_CASES,
    SCORE_CASES,
    TOLERANCE,
    assert_numbers_close,
    assert_rows_close,
    decode_inputs,
    score_inputs,
    slot_inputs,
)

IMPLEMENTATIONS = ("xla", "pallas")


def arrays(inputs):
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def quantized(low_high: np.ndarray) -> QuantizedSummaries:
    """Rounded outward; pages that are NaN become the largest numbers of the format."""
    unread = np.isnan(low_high.astype(np.float32)).any(axis=(2, 3))
    values, exponents = score_reference.quantize(
        np.where(unread[..., None, None], 0, low_high.astype(np.float32)),
        group=group_size(low_high.shape[-1]),
    )
    values[unread], exponents[unread] = 127, 255
    return QuantizedSummaries(jnp.asarray(values), jnp.asarray(exponents))


# In interpret mode a kernel takes seconds to compile; its body is the same for pages and slots.
DECODE_RUNS = [
    pytest.param(kind, case, implementation, id=f"{kind}-{case}-{implementation}")
    for kind in ("paged", "slot")
    for implementation in IMPLEMENTATIONS
    for case in (
        DECODE_CASES[::3] if (kind, implementation) == ("slot", "pallas") else DECODE_CASES
    )
]


@pytest.mark.parametrize(("kind", "case", "implementation"), DECODE_RUNS)
def test_decode(kind, case, implementation):
    inputs = decode_inputs(case) if kind == "paged" else slot_inputs(case)
    scale = case.width**-0.5
    op = dispatch.paged_decode if kind == "paged" else dispatch.slot_decode
    oracle = reference.paged_decode if kind == "paged" else reference.slot_decode
    run = jax.jit(functools.partial(op, scale=scale, implementation=implementation))
    out, lse = run(**arrays(inputs))
    expected, expected_lse = oracle(**inputs, scale=scale)
    assert out.dtype == inputs["q"].dtype and lse.dtype == jnp.float32
    assert_rows_close(out, expected, TOLERANCE[case.dtype])
    assert_numbers_close(lse, expected_lse, 1e-5)


@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_number_that_is_none_shows_where_it_is_read(what, implementation):
    """A damaged key or value must not come out as an attention of 0."""
    case = DECODE_CASES[0]
    inputs = decode_inputs(case)
    b, h, n = np.argwhere(inputs["token_counts"] > 0)[0]
    inputs[f"{what}_pages"][inputs["block_ids"][b, h, n], h, 0, 0] = np.nan
    run = functools.partial(dispatch.paged_decode, implementation=implementation)
    out, _ = jax.jit(functools.partial(run, scale=case.width**-0.5))(**arrays(inputs))
    bad = np.isnan(np.asarray(out, np.float32)).any(axis=(2, 3))
    assert bad[b, h] and bad.sum() == 1


@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_zeros_would_fail(case):
    inputs = decode_inputs(case)
    expected, lse = reference.paged_decode(**inputs, scale=case.width**-0.5)
    slots, slot_lse = reference.slot_decode(**slot_inputs(case), scale=case.width**-0.5)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(slots, expected, atol=1e-12)
    np.testing.assert_allclose(slot_lse, lse, atol=1e-12)
    with pytest.raises(AssertionError):
        assert_rows_close(np.zeros_like(expected), expected, TOLERANCE[case.dtype])
    with pytest.raises(AssertionError):
        assert_numbers_close(np.zeros_like(lse), lse, 1e-5)


@pytest.mark.parametrize(
    "config",
    [TuningConfig(16, 1, 6, 1, 1), TuningConfig(16, 2, 4, 1, 1), TuningConfig(64, 1, 2, 4, 1)],
    ids=["one-step", "two-steps", "wide"],
)
def test_any_split_gives_the_same(config):
    """Six pages divided in several ways, the last part partly or wholly empty."""
    inputs = decode_inputs(DECODE_CASES[0])
    out, lse = pallas_decode.paged_decode(**arrays(inputs), scale=0.25, config=config)
    expected, expected_lse = reference.paged_decode(**inputs, scale=0.25)
    assert_rows_close(out, expected, 1e-5)
    assert_numbers_close(lse, expected_lse, 1e-5)


def test_a_split_that_leaves_pages_out_is_refused():
    inputs = decode_inputs(DECODE_CASES[0])
    with pytest.raises(ValueError, match="covers 80 tokens, fewer than the 96"):
        pallas_decode.paged_decode(
            **arrays(inputs), scale=0.25, config=TuningConfig(16, 5, 1, 1, 1)
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SCORE_CASES, ids=str)
def test_page_scores(case, implementation):
    inputs = score_inputs(case)
    low_high = inputs.pop("low_high")
    summaries, read_back = jnp.asarray(low_high), low_high
    if case.quantized:
        summaries = quantized(low_high)
        read_back = score_reference.dequantize(summaries.values, summaries.exponents)
    run = jax.jit(
        functools.partial(dispatch.page_scores, page_size=case.page, implementation=implementation)
    )
    scores = run(summaries=summaries, **arrays(inputs))
    expected = score_reference.page_scores(**inputs, summaries=read_back, page_size=case.page)
    assert scores.dtype == jnp.float32
    # The inputs are exact and sums are float32 in every dtype.
    assert_numbers_close(scores, expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_numbers_close(np.zeros_like(expected), expected, 1e-5)


def test_page_scores_are_upper_bounds():
    """Law 4, for 16 and for 8 bits."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(6, 2, 16, 64)) * np.exp(rng.normal(size=64))
    q = rng.normal(size=(1, 2, 4, 64))
    table, lengths = np.arange(6)[None], np.array([96])
    true = np.einsum("bkgh,pkth->bkptg", q, keys).max(axis=(3, 4))
    low_high = score_reference.summarize(keys, np.full((6, 2), 16))
    tight = score_reference.page_scores(q, low_high, table, lengths, page_size=16)
    small = score_reference.dequantize(*score_reference.quantize(low_high, group=32))
    loose = score_reference.page_scores(q, small, table, lengths, page_size=16)
    assert (tight >= true).all()
    assert (loose >= tight).all()
    assert (loose - tight).max() < 0.05 * np.abs(tight).max()


def test_reference_by_hand():
    """Two tokens with logits 0 and log 3: weights 1/4 and 3/4, lse = log 4."""
    q = np.array([[[[1.0, 0.0]]]])
    k = np.array([[[[0.0, 5.0], [np.log(3), 7.0]]]])
    v = np.array([[[[4.0, 0.0], [0.0, 8.0]]]])
    out, lse = reference.paged_decode(q, k, v, [[[0]]], [[[2]]], scale=1.0)
    np.testing.assert_allclose(out[0, 0, 0], [1.0, 6.0])
    np.testing.assert_allclose(lse[0, 0, 0], np.log(4))
    summaries = np.array([[[[-1.0, 2.0], [3.0, 4.0]]]])
    scores = score_reference.page_scores([[[[2.0, -1.0]]]], summaries, [[0, 0]], [2], page_size=2)
    np.testing.assert_array_equal(scores[0, 0], [2 * 3 - 1 * 2, -np.inf])


def test_merge_of_parts_is_the_whole():
    inputs = decode_inputs(DECODE_CASES[3])
    counts = inputs["token_counts"]
    parts = []
    for keep in (np.arange(counts.shape[2]) % 2 == 0, np.arange(counts.shape[2]) % 2 == 1):
        part = {**inputs, "token_counts": np.where(keep, counts, 0)}
        parts.append(reference.paged_decode(**part, scale=0.25))
    outs, lses = (np.stack(x) for x in zip(*parts, strict=True))
    whole, whole_lse = reference.paged_decode(**inputs, scale=0.25)
    for merged, merged_lse in (
        reference.merge(outs, lses),
        dispatch.merge(jnp.asarray(outs, jnp.float32), jnp.asarray(lses, jnp.float32)),
    ):
        assert_rows_close(merged, whole, 1e-5)
        assert_numbers_close(merged_lse, whole_lse, 1e-5)


def bad_calls():
    zeros = functools.partial(np.zeros, dtype=np.float32)
    q, pages, slots = zeros((2, 3, 4, 16)), zeros((7, 3, 16, 16)), zeros((2, 3, 5, 16, 16))
    k_slots = zeros((2, 3, 16, 5, 16))
    ids, table = np.zeros((2, 3, 5), np.int32), np.zeros((2, 5), np.int32)
    lengths, summaries = np.zeros(2, np.int32), zeros((7, 3, 2, 16))
    wide = QuantizedSummaries(summaries.astype(np.int8), np.zeros((7, 3, 2, 2), np.uint8))
    paged = functools.partial(dispatch.paged_decode, scale=0.25)
    slot = functools.partial(dispatch.slot_decode, scale=0.25)
    scores = functools.partial(dispatch.page_scores, page_size=16)
    return {
        "axes": (lambda: paged(q[0], pages, pages, ids, ids), r"q\[B, K, G, H\].*\(3, 4, 16\)"),
        "heads": (lambda: paged(q, pages[:, :2], pages, ids, ids), r"K is 3 as in q"),
        "values": (lambda: paged(q, pages, pages[:5], ids, ids), r"blocks is 7 as in k_pages"),
        "counts": (lambda: slot(q, k_slots, slots, ids[:1]), r"B is 2 as in q"),
        "empty": (lambda: slot(q, k_slots[:, :, :, :0], slots, ids), r"S must not be 0"),
        "ids": (lambda: paged(q, pages, pages, ids.astype(float), ids), r"block_ids must be int32"),
        "dtype": (lambda: paged(q.astype(int), pages, pages, ids, ids), r"q must be float32"),
        "mixed": (lambda: slot(q, k_slots, slots.astype(np.float16), ids), r"one dtype"),
        "scale": (lambda: paged(q, pages, pages, ids, ids, scale=0.0), r"scale.*0\.0"),
        "pair": (lambda: scores(q, summaries[:, :, :1], table, lengths), r"2 is 2|but 2"),
        "page": (lambda: scores(q, summaries, table, lengths, page_size=12), r"page size.*12"),
        "exponents": (
            lambda: scores(q, wide, table, lengths),
            r"exponents has shape \(7, 3, 2, 2\), expected \(7, 3, 2, 1\)",
        ),
        "name": (
            lambda: paged(q, pages, pages, ids, ids, implementation="cuda"),
            r"implementation must be None or one of .*'cuda'",
        ),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_triton_that_cannot_run_raises():
    if jax.default_backend() == "gpu":
        pytest.skip("here it can run")
    inputs = arrays(decode_inputs(DECODE_CASES[0]))
    with pytest.raises(ValueError, match="implementation='triton'"):
        dispatch.paged_decode(**inputs, scale=0.25, implementation="triton")


# The implementations of each operation.
FILES = {
    "add_norm": {"pallas", "xla"},
    "decode_attention": {"pallas", "xla"},
    "page_codes": {"xla"},
    "page_scores": {"pallas", "triton", "xla"},
    "page_selection": {"pallas", "xla"},
    "sketch_query": {"pallas", "xla"},
    "sketch_scores": {"pallas", "triton", "xla"},
    "sketch_encode": {"pallas", "xla"},
    "rerank_plan": {"pallas", "xla"},
    "sparse_decode": {"pallas", "triton", "xla"},
    "prefill": {"cudnn", "xla"},
    "page_moves": {"pallas"},
}


def test_each_operation_is_a_folder_with_equal_file_names(repository):
    """`dispatch` finds an implementation by these names; each operation has an oracle."""
    folders = [path.parent for path in (repository / "pallas_kernels").glob("*/__init__.py")]
    found = {folder.name: {path.stem for path in folder.glob("*.py")} for folder in folders}
    optional = {"__init__", "tuning"}
    assert {name: files - optional for name, files in found.items()} == {
        name: files | {"reference"} for name, files in FILES.items()
    }
