"""The kernels that only a rerank calls, compiled for GPUs that are not here."""

import dataclasses

import jax.numpy as jnp
import pytest

from flexijax.pallas_kernels import dispatch_rerank
from flexijax.pallas_kernels.rerank import RerankStats
from flexijax.pallas_kernels.sketches import SketchCode, words
from tests.test_kernels_gpu import GPUS, compiled, integers, needs_compiler, shape


@needs_compiler
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("kind", "bits", "width", "page", "dtype"),
    [
        ("pages", 2, 128, 16, jnp.bfloat16),
        ("slots", 2, 128, 16, jnp.bfloat16),
        ("slots", 4, 80, 8, jnp.float16),
        ("pages", 1, 256, 64, jnp.float32),
    ],
    ids=str,
)
def test_encoding_is_one_kernel(kind, bits, width, page, dtype, gpu):
    """Codes are written in place, keys are read where they lie, and products take tensor cores."""
    batch, heads, blocks, slots, entries = 16, 6, 512, 65, 2
    codes = shape(blocks, heads, bits, words(width), page, dtype=jnp.uint32)
    code = SketchCode(*(shape(batch, heads, width, dtype=jnp.float32) for _ in range(2)))
    listed = integers(batch, entries)
    if kind == "pages":
        keys = shape(blocks, heads, page, width, dtype=dtype)
        op, arguments = dispatch_rerank.paged_encode, (codes, code, keys, listed)
    else:
        keys = shape(batch, heads, width, slots, page, dtype=dtype)
        held = integers(batch, heads, slots)
        op, arguments = dispatch_rerank.slot_encode, (codes, code, keys, held, listed, listed)
    report = compiled(op, arguments, gpu=gpu, donate=(0,))
    [kernel] = report.kernels
    assert kernel.spill_bytes == 0 and kernel.registers <= (168 if dtype == jnp.float32 else 64)
    assert report.aliased_arguments == {0} and report.device.temporaries == 0
    assert not kernel.instructions or kernel.tensor_core_instructions > 0


@needs_compiler
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("room", "slots"), [(64, 65), (64, 72), (256, 257), (21, 37)])
def test_planning_is_one_kernel(room, slots, gpu):
    """Slots and statistics are written in place, and nothing is as long as a request."""
    batch, heads, pages = 16, 6, 2048
    rows = (batch, heads)
    stats = RerankStats(
        **{
            field.name: shape(
                *rows, dtype=jnp.float32 if field.name in ("overlap", "rco") else jnp.int32
            )
            for field in dataclasses.fields(RerankStats)
        }
    )
    arguments = (
        integers(*rows, room),
        integers(*rows, slots),
        integers(batch),
        integers(batch, 1),
        integers(batch, 1),
        integers(batch, pages),
        integers(batch, 1),
        stats,
    )

    def op(*args):
        # Without the RCO, to which jax would give the memory of a statistic.
        made = dispatch_rerank.rerank(*args, page_size=16)
        return made.slot_page, made.load, made.stats

    report = compiled(op, arguments, gpu=gpu, donate=(1, 7))
    [kernel] = report.kernels
    assert kernel.spill_bytes == 0 and kernel.registers <= 128
    # What XLA keeps of a program with so many results; a copy of the slots would be more.
    assert report.device.temporaries <= 1024 < 4 * batch * heads * slots
    assert report.copies(at_least=1) == 0
    assert report.device.aliased == 4 * batch * heads * (slots + 6)
