"""The Triton twins on the shared cases: interpreted on the CPU here, compiled on a GPU."""

import importlib.util
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import lanes
from flexijax.pallas_kernels.page_scores import reference as score_reference
from flexijax.pallas_kernels.sketch_scores import reference as sketch_reference
from flexijax.pallas_kernels.sparse_decode import reference as decode_reference
from tests.kernel_cases import (
    DECODE_CASES,
    SCORE_CASES,
    SKETCH_CASES,
    assert_numbers_close,
    assert_rows_close,
    decode_inputs,
    score_inputs,
    sketch_inputs,
    slot_inputs,
)

torch = pytest.importorskip("torch")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, Triton's own included
pytest.importorskip("triton")

from flexijax.pallas_kernels.page_scores import triton as page_scores_triton  # noqa: E402
from flexijax.pallas_kernels.sketch_scores import triton as sketch_scores_triton  # noqa: E402
from flexijax.pallas_kernels.sparse_decode import triton as sparse_decode_triton  # noqa: E402
from flexijax.pallas_kernels.summaries import group_size  # noqa: E402

# bfloat16 is not one of NumPy's types, and the interpreter is slow: a few cases of each kind.
DECODES = [c for c in DECODE_CASES if c.dtype != "bfloat16" and max(c.lengths) < 100]
SCORES = [c for c in SCORE_CASES if c.dtype != "bfloat16" and max(c.lengths) < 100]


def tensor(array: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


@pytest.mark.parametrize("case", DECODES, ids=str)
@pytest.mark.parametrize("kind", ["paged", "slot"])
def test_decode(kind, case):
    slots = kind == "slot"
    inputs = slot_inputs(case) if slots else decode_inputs(case)
    arrays = {name: tensor(value) for name, value in inputs.items()}
    k, v = (arrays[n] for n in (("k_slots", "v_slots") if slots else ("k_pages", "v_pages")))
    counts = arrays["token_counts"]
    batch, heads, group, width = inputs["q"].shape
    config, grid, constants = sparse_decode_triton.options(
        batch=batch,
        heads=heads,
        group=group,
        width=width,
        pages=counts.shape[2],
        page=case.page,
        itemsize=k.element_size(),
    )
    parts = (config.splits, batch, heads, group)
    out = torch.full((*parts, width), torch.nan, device=DEVICE)
    lse = torch.full(parts, torch.nan, device=DEVICE)
    scale = width**-0.5
    sparse_decode_triton.flexijax_decode[grid](
        arrays["q"],
        k,
        v,
        arrays.get("block_ids", counts),
        counts,
        out,
        lse,
        **constants,
        SCALE=scale,
        SLOTS=slots,
        PRECISION="tf32x3" if case.dtype == "float32" else "ieee",
    )
    oracle = decode_reference.slot_decode if slots else decode_reference.paged_decode
    expected, expected_lse = oracle(**inputs, scale=scale)
    found, found_lse = decode_reference.merge(out.cpu().numpy(), lse.cpu().numpy())
    assert_rows_close(found, expected, 1e-5 if case.dtype == "float32" else 1e-2)
    assert_numbers_close(found_lse, expected_lse, 1e-5)


@pytest.mark.parametrize("case", SCORES, ids=str)
def test_page_scores(case):
    inputs = score_inputs(case)
    low_high = inputs.pop("low_high")
    values, exponents, read_back = low_high, np.zeros(1, np.uint8), low_high
    if case.quantized:
        unread = np.isnan(low_high).any(axis=(2, 3))
        values, exponents = score_reference.quantize(
            np.where(unread[..., None, None], 0, low_high), group=group_size(case.width)
        )
        values[unread], exponents[unread] = 127, 255
        read_back = score_reference.dequantize(values, exponents)
    pages = inputs["block_table"].shape[1]
    batch, heads, group, width = inputs["q"].shape
    constants = page_scores_triton.options(
        group=group, width=width, pages=pages, page=case.page, quantized=case.quantized
    )
    scores = torch.full((batch, heads, pages), torch.nan, device=DEVICE)
    page_scores_triton.flexijax_scores[(-(-pages // constants["BLOCK"]), heads, batch)](
        tensor(inputs["q"]),
        tensor(inputs["block_table"]),
        tensor(inputs["lengths"]),
        tensor(values),
        tensor(exponents),
        scores,
        **constants,
        PRECISION="tf32x3" if case.dtype == "float32" else "ieee",
    )
    expected = score_reference.page_scores(**inputs, summaries=read_back, page_size=case.page)
    assert_numbers_close(scores.cpu().numpy(), expected, 1e-5)


@pytest.mark.parametrize("case", [c for c in SKETCH_CASES if max(c.lengths) < 100], ids=str)
def test_sketch_scores(case):
    inputs = sketch_inputs(case)
    expected = sketch_reference.sketch_scores(**inputs, page_size=case.page)
    # PyTorch has few operations for uint32, and the kernel reads the bits alone.
    inputs["codes"] = inputs["codes"].view(np.int32)
    pages = inputs["block_table"].shape[1]
    batch, heads, group, width = inputs["weights"].shape
    inputs["weights"] = np.array(lanes.pack(jnp.asarray(inputs["weights"])))
    constants = sketch_scores_triton.options(
        batch=batch,
        heads=heads,
        group=group,
        width=width,
        pages=pages,
        page=case.page,
        bits=case.bits,
    )
    if DEVICE == "cpu":
        constants["ASM"] = False
    scores = torch.full((batch, heads, group, pages), torch.nan, device=DEVICE)
    names = ("weights", "offset", "unit", "codes", "block_table", "lengths")
    sketch_scores_triton.flexijax_sketches[(-(-pages // constants["TILE"]), heads, batch)](
        *(tensor(inputs[name]) for name in names), scores, **constants
    )
    assert_numbers_close(scores.cpu().numpy(), expected, 1e-5)


COMPILE = """
import functools
from flexijax.aot import compile as aot
aot.prepare()
import jax, jax.numpy as jnp
from flexijax.pallas_kernels import dispatch, platform
from flexijax.aot.targets import target

def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=platform.sharding())

ids = shape(2, 2, 8, dtype=jnp.int32)
decode = functools.partial(dispatch.paged_decode, scale=0.1, implementation="triton")
pool = shape(64, 2, 16, 128)
report = aot.compile_for(decode, (shape(2, 2, 4, 128), pool, pool, ids, ids), target=target("h100"))
assert "triton_kernel_call" in report.hlo and report.copies(at_least=65536) == 0
scores = functools.partial(dispatch.page_scores, page_size=16, implementation="triton")
table, lengths = shape(2, 64, dtype=jnp.int32), shape(2, dtype=jnp.int32)
arguments = (shape(2, 2, 4, 128), shape(64, 2, 2, 128), table, lengths)
report = aot.compile_for(scores, arguments, target=target("a100"))
assert "triton_kernel_call" in report.hlo
from flexijax.pallas_kernels.sketches import SketchQuery
floats = shape(2, 2, 4, dtype=jnp.float32)
query = SketchQuery(shape(2, 2, 4, 128, dtype=jnp.int8), floats, floats)
sketches = functools.partial(dispatch.sketch_scores, page_size=16, implementation="triton")
arguments = (query, shape(64, 2, 2, 4, 16, dtype=jnp.uint32), table, lengths)
report = aot.compile_for(sketches, arguments, target=target("h100"))
assert "triton_kernel_call" in report.hlo
print("compiled")
"""


def test_twins_compile_through_jax_triton():
    """In a process of its own: here the kernels are defined for the interpreter."""
    if not all(map(importlib.util.find_spec, ("jax_triton", "jax_cuda12_plugin"))):
        pytest.skip("needs jax-triton and the aot extra")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "compiled", done.stderr
