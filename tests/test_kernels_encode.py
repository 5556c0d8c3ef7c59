"""Sketches of pages that filled up: every implementation against float64 NumPy, page by page."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch_rerank
from flexijax.pallas_kernels.sketch_encode import reference
from flexijax.pallas_kernels.sketch_scores.reference import hadamard, sketch_unpack
from flexijax.pallas_kernels.sketches import SketchCode
from tests.kernel_cases import numpy_dtype

IMPLEMENTATIONS = ("xla", "pallas")


@dataclass(frozen=True)
class EncodeCase:
    """Pages of `entries` entries a request, some of which name nothing."""

    name: str
    dtype: str = "float32"
    bits: int = 2
    batch: int = 3
    heads: int = 2
    width: int = 64
    page: int = 16
    entries: int = 2

    def __str__(self) -> str:
        return self.name


CASES = (
    EncodeCase("float32"),
    EncodeCase("bf16-width-128", "bfloat16", width=128, entries=1),
    EncodeCase("f16-4-bit-width-80", "float16", bits=4, width=80),
    EncodeCase("1-bit-page-4-width-8", bits=1, page=4, width=8, entries=3),
    EncodeCase("page-32-width-24-one-head", "bfloat16", heads=1, page=32, width=24),
)


def encode_inputs(case: EncodeCase):
    """(arguments of `paged_encode`, those of `slot_encode`): NaN in every key that is not named."""
    rng = np.random.default_rng(len(case.name))
    dtype, slots = numpy_dtype(case.dtype), 5
    blocks = case.batch * case.entries + 4
    heads = (case.batch, case.heads)
    block = rng.permutation(blocks)[: case.batch * case.entries].astype(np.int32)
    block = block.reshape(case.batch, case.entries)
    page = np.stack([rng.permutation(40)[: case.entries] for _ in range(case.batch)])
    block[0, -1] = page[0, -1] = -1
    slot_page = 100 + np.arange(np.prod(heads) * slots, dtype=np.int32).reshape(*heads, slots)
    slot_page[0, 0, 3] = -1  # an empty slot is not page -1
    k_pages = np.full((blocks, case.heads, case.page, case.width), np.nan, dtype)
    k_slots = np.full((*heads, case.width, slots, case.page), np.nan, dtype)
    middle = 3 * rng.normal(size=(case.heads, 1, case.width))
    for b, e in zip(*np.nonzero(block >= 0), strict=True):
        keys = rng.normal(size=(case.heads, case.page, case.width)) + middle
        k_pages[block[b, e]] = keys.astype(dtype)
        for h in range(case.heads):
            # The slots of two entries of one head differ; another head has them elsewhere.
            slot = (b + 2 * h + e) % slots
            slot_page[b, h, slot], k_slots[b, h, :, slot] = page[b, e], k_pages[block[b, e], h].T
    mean = (middle @ hadamard(case.width))[:, 0] + rng.normal(size=(*heads, case.width)) / 4
    code = SketchCode(mean.astype(np.float32), rng.uniform(0.7, 1.3, mean.shape).astype(np.float32))
    shape = (blocks, case.heads, case.bits, -(-case.width // 32), case.page)
    codes = rng.integers(0, 2**32, shape, dtype=np.uint32)
    page = page.astype(np.int32)
    paged = {"codes": codes, "code": code, "k_pages": k_pages, "block": block}
    slotted = {"codes": codes, "code": code, "k_slots": k_slots, "slot_page": slot_page}
    return paged, {**slotted, "page": page, "block": block}


def of_reference(oracle, inputs):
    rest = {name: value for name, value in inputs.items() if name != "code"}
    return oracle(mean=inputs["code"].mean, step=inputs["code"].step, **rest)


def run(op, inputs, implementation):
    call = jax.jit(functools.partial(op, implementation=implementation))
    return np.asarray(call(**jax.tree.map(jnp.asarray, inputs)))


def assert_same_codes(found, expected, old, width):
    """Levels equal but for one in 2,000, which float32 may round to the other side of an edge.

    Rows that were not written are equal bit by bit, and so are the bits beyond the last channel.
    """
    assert found.dtype == np.uint32 and found.shape == expected.shape
    written = (expected != old).any(axis=(2, 3, 4))
    assert written.any() and not written.all()
    np.testing.assert_array_equal(found[~written], old[~written])
    ours, theirs = sketch_unpack(found[written], width), sketch_unpack(expected[written], width)
    assert (ours != theirs).sum() <= theirs.size / 2000, (ours != theirs).sum()
    assert np.abs(ours - theirs).max() <= 1 and theirs.std() > 0.3
    beyond = sketch_unpack(found[written], 32 * found.shape[3])[..., width:]
    assert not beyond.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_of_filled_pages(case, implementation):
    paged, slotted = encode_inputs(case)
    expected = of_reference(reference.paged_encode, paged)
    np.testing.assert_array_equal(of_reference(reference.slot_encode, slotted), expected)
    for op, inputs in (
        (dispatch_rerank.paged_encode, paged),
        (dispatch_rerank.slot_encode, slotted),
    ):
        found = run(op, inputs, implementation)
        assert_same_codes(found, expected, paged["codes"], case.width)
        with pytest.raises(AssertionError):
            assert_same_codes(np.zeros_like(found), expected, paged["codes"], case.width)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_page_that_a_head_does_not_hold_leaves_its_codes(implementation):
    _, inputs = encode_inputs(CASES[0])
    inputs["slot_page"] = inputs["slot_page"].copy()
    row, head = 1, 1
    inputs["slot_page"][row, head] = -1
    found = run(dispatch_rerank.slot_encode, inputs, implementation)
    mine = inputs["block"][row]
    np.testing.assert_array_equal(found[mine, head], inputs["codes"][mine, head])
    assert (found[mine, 0] != inputs["codes"][mine, 0]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_named_changes_nothing(implementation):
    paged, slotted = encode_inputs(CASES[0])
    for op, inputs in (
        (dispatch_rerank.paged_encode, paged),
        (dispatch_rerank.slot_encode, slotted),
    ):
        inputs["block"] = np.full_like(inputs["block"], -1)
        np.testing.assert_array_equal(run(op, inputs, implementation), inputs["codes"])


def bad_calls():
    paged, slotted = encode_inputs(CASES[0])

    def pages(**changes):
        return dispatch_rerank.paged_encode(**{**paged, **changes})

    def slots(**changes):
        return dispatch_rerank.slot_encode(**{**slotted, **changes})

    codes, code = paged["codes"], paged["code"]
    return {
        "bits": (
            lambda: pages(codes=np.repeat(codes, 2, 2)[:, :, :3]),
            r"one of \(1, 2, 4\), got 3",
        ),
        "words": (lambda: slots(codes=codes[:, :, :, :1]), r"codes.*but 2 is 2"),
        "heads": (lambda: pages(k_pages=paged["k_pages"][:, :1]), r"K is 2 as in mean"),
        "blocks": (lambda: pages(codes=codes[1:]), r"blocks is 10 as in k_pages"),
        "step": (lambda: slots(code=SketchCode(code.mean, code.step[:, :, :1])), r"H is 64"),
        "slots": (lambda: slots(slot_page=slotted["slot_page"][..., 1:]), r"S is 5 as in k_slots"),
        "page": (lambda: slots(page=slotted["page"].astype(float)), r"page must be int32"),
        "keys": (lambda: pages(k_pages=paged["k_pages"].astype(int)), r"keys must be float32"),
        "name": (lambda: pages(implementation="cuda"), r"implementation must be None or one of"),
    }


@pytest.mark.parametrize("name", bad_calls())
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_bad_arguments_are_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
