"""The kernels compiled for GPUs that are not here: registers, spills, instructions, aliasing."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from flexijax.aot import compile as aot
from flexijax.aot.targets import target, targets
from flexijax.cache import tiers
from flexijax.pallas_kernels import dispatch, platform
from flexijax.pallas_kernels.prefill import cudnn
from flexijax.pallas_kernels.sketches import SketchQuery, words
from flexijax.pallas_kernels.summaries import QuantizedSummaries, group_size

try:
    aot.prepare()  # while tests are collected, before any of them touches a device
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)

needs_compiler = pytest.mark.skipif(bool(MISSING), reason=MISSING)
GPUS = sorted(targets())


def shape(*sizes, dtype=jnp.bfloat16, memory="device"):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=platform.sharding(memory))


integers = functools.partial(shape, dtype=jnp.int32)


def compiled(function, arguments, *, gpu="h100", donate=()):
    """What a report says of a function, jitted as a program is."""
    return aot.compile_for(
        lambda: jax.jit(lambda *args: function(*args), donate_argnums=donate),
        arguments,
        target=target(gpu),
    )


def decode_report(kind, width, dtype, *, gpu="h100", batch=16, group=4, page=16):
    """The kernel of unstable (two heads) or stable heads (six) with a budget of 1024 tokens."""
    pages, scale = 1024 // page, width**-0.5
    if kind == "pages":
        pool = shape(4096, 2, page, width, dtype=dtype)
        ids = integers(batch, 2, pages)
        q = shape(batch, 2, group, width, dtype=dtype)
        op = functools.partial(dispatch.paged_decode, scale=scale)
        arguments = (q, pool, pool, ids, ids)
    else:
        slots = pages + 2
        q = shape(batch, 6, group, width, dtype=dtype)
        k = shape(batch, 6, width, slots, page, dtype=dtype)
        v = shape(batch, 6, slots, page, width, dtype=dtype)
        op = functools.partial(dispatch.slot_decode, scale=scale)
        arguments = (q, k, v, integers(batch, 6, slots))
    report = compiled(op, arguments, gpu=gpu)
    [kernel] = [k for k in report.kernels if k.name == f"flexijax_decode_{kind}"]
    assert all(k.spill_bytes == 0 for k in report.kernels)
    return kernel


@needs_compiler
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("kind", "batch"), [("pages", 1), ("pages", 16), ("slots", 16)])
def test_decode_fits_the_gpu(kind, batch, gpu):
    kernel = decode_report(kind, 128, jnp.bfloat16, gpu=gpu, batch=batch)
    assert kernel.registers <= 128
    blocks = kernel.grid[0] * kernel.grid[1] * kernel.grid[2]
    assert blocks >= 0.9 * target(gpu).cores
    if kernel.instructions:
        assert kernel.tensor_core_instructions > 0
        assert kernel.wide_loads > 0


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "width", "dtype", "group", "page"),
    [
        ("pages", 64, jnp.bfloat16, 1, 16),
        ("slots", 80, jnp.float16, 8, 32),
        ("pages", 96, jnp.bfloat16, 17, 64),
        ("slots", 256, jnp.bfloat16, 2, 16),
        ("pages", 128, jnp.float32, 4, 16),
    ],
    ids=str,
)
def test_decode_never_spills(kind, width, dtype, group, page):
    kernel = decode_report(kind, width, dtype, group=group, page=page)
    if kernel.instructions:
        assert kernel.tensor_core_instructions > 0 and kernel.wide_loads > 0
    if dtype != jnp.float32:
        assert kernel.registers <= 128


@needs_compiler
@pytest.mark.parametrize("quantized", [False, True], ids=["16-bit", "8-bit"])
def test_scores_fit_the_gpu(quantized):
    summaries = shape(4096, 2, 2, 128)
    if quantized:
        summaries = QuantizedSummaries(
            shape(4096, 2, 2, 128, dtype=jnp.int8),
            shape(4096, 2, 2, 128 // group_size(128), dtype=jnp.uint8),
        )
    report = compiled(
        functools.partial(dispatch.page_scores, page_size=16),
        (shape(16, 2, 4, 128), summaries, integers(16, 2048), integers(16)),
    )
    [kernel] = report.kernels
    assert kernel.spill_bytes == 0 and kernel.registers <= 128
    assert report.device.temporaries == 0
    if kernel.instructions:
        assert kernel.tensor_core_instructions > 0 and kernel.wide_loads > 0


@needs_compiler
@pytest.mark.parametrize("heads", [1, 5, 7])
def test_scores_of_odd_heads_do_not_spill(heads):
    """A query head a KV head, five and seven KV heads once spilled on an A100."""
    report = compiled(
        functools.partial(dispatch.page_scores, page_size=16),
        (shape(16, heads, 1, 128), shape(4096, heads, 2, 128), integers(16, 2048), integers(16)),
        gpu="a100",
    )
    [kernel] = report.kernels
    assert kernel.spill_bytes == 0 and kernel.registers <= 128


@needs_compiler
@pytest.mark.parametrize(("bits", "width"), [(1, 80), (2, 128), (4, 128)])
def test_sketch_scores_fit_the_gpu(bits, width):
    heads = (16, 2, 4)
    query = SketchQuery(
        shape(*heads, width, dtype=jnp.int8),
        shape(*heads, dtype=jnp.float32),
        shape(*heads, dtype=jnp.float32),
    )
    codes = shape(4096, 2, bits, words(width), 16, dtype=jnp.uint32)
    report = compiled(
        functools.partial(dispatch.sketch_scores, page_size=16),
        (query, codes, integers(16, 2048), integers(16)),
    )
    [kernel] = [k for k in report.kernels if k.name == "flexijax_sketch_scores"]
    assert kernel.spill_bytes == 0 and kernel.registers <= (128 if bits < 4 else 168)
    # The weights, four to a register, and nothing else.
    assert report.device.temporaries <= math.prod(heads) * words(width) * 32
    tokens = 16 * 2048 / kernel.grid[0] / (kernel.threads / 32)  # of a warp
    if kernel.instructions:
        # Four products of the four query heads for every four channels, and little beside.
        products = sum(n for name, n in kernel.instructions.items() if name.startswith("IDP.4A"))
        assert products == tokens / 32 * 4 * words(width) * 8
        most = {1: 320, 2: 360, 4: 440}[bits]
        assert sum(kernel.instructions.values()) * 32 / tokens <= most


@needs_compiler
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("width", [80, 128])
def test_moves_are_zero_copy(width, gpu):
    """Host pages stay in host memory, targets are written in place, and nothing is staged."""
    host = shape(512, 6, 16, width, memory="pinned_host")
    k, v = shape(4, 6, width, 66, 16), shape(4, 6, 66, 16, width)
    pool_bytes, slot_bytes = 2 * 512 * 6 * 16 * width * 2, 2 * 4 * 6 * 66 * 16 * width * 2
    pages = tiers.HostPages(host, host)
    promote = compiled(
        functools.partial(tiers.promote, transfer="zero_copy"),
        (k, v, pages, integers(4, 6, 66)),
        gpu=gpu,
        donate=(0, 1),
    )
    offload = compiled(
        functools.partial(tiers.offload, transfer="zero_copy"),
        (pages, k, v, integers(4, 2), integers(4, 6, 2)),
        gpu=gpu,
        donate=(0,),
    )
    found = compiled(
        functools.partial(tiers.offload_pages, transfer="zero_copy"),
        (pages, k, v, integers(4, 6, 66), integers(4, 2), integers(4, 2)),
        gpu=gpu,
        donate=(0,),
    )
    assert promote.device.aliased == slot_bytes
    assert offload.host.aliased == found.host.aliased == pool_bytes
    for report in (promote, offload, found):
        assert report.host.arguments == pool_bytes and report.host.temporaries == 0
        assert report.aliased_arguments == {0, 1}
        assert report.copies(at_least=1024) == 0
        assert report.host_callbacks == 0 and report.collectives == 0
        for kernel in report.kernels:
            assert kernel.spill_bytes == 0
            assert not kernel.instructions or kernel.wide_loads > 0


@needs_compiler
def test_prefill_takes_cudnn_where_it_is():
    q, k, v = shape(256, 2, 4, 128), shape(2, 128, 1024), shape(2, 1024, 128)
    with platform.compiling_for("gpu"):
        there = cudnn.fits(jnp.zeros((1, 128), jnp.bfloat16))
    report = compiled(
        functools.partial(dispatch.prefill_attention, scale=0.1),
        (q, k, v, integers()),
    )
    assert ("cudnn" in report.hlo) == there


def test_counting_in_the_program_text():
    hlo = """HloModule m, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, {}, must-alias) },
    entry_computation_layout={...}
      %copy.1 = bf16[64,128]{1,0} copy(%a)
      %c = (s8[4096]{0}, s8[4096]{0}, u32[]) copy-start(%b)
      %d = f32[]{:T(128)} copy(%b)
      %e = f32[8]{0} custom-call(%d), custom_call_target="xla_ffi_python_gpu_callback"
      %f = f32[8]{0} all-reduce(%e), replica_groups={}
    """
    none = aot.MemoryReport(arguments=5, outputs=4, aliased=3, temporaries=2)
    report = aot.CompiledReport(
        target=target("h100"),
        device=none,
        host=none,
        kernels=(),
        thunks=(),
        hlo=hlo,
        kept_arguments=(0, 2, 4, 5),
        lower_seconds=0.0,
        compile_seconds=0.0,
    )
    assert report.aliased_arguments == {0, 5}  # the program does not read 1 and 3
    assert report.copies(at_least=16384) == 1
    assert report.copies(at_least=4096) == 2
    assert report.copies(at_least=1) == 3
    assert report.host_callbacks == 1 and report.collectives == 1
    assert report.staging_copies == 0
    assert none.peak == 8


def test_counting_what_touches_host_memory():
    hlo = """HloModule m, is_scheduled=true
    ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
      %a = bf16[64,128]{1,0:S(5)} parameter(0)
      %k = bf16[64,128]{1,0:S(5)} custom-call(%a), custom_call_target="kernel"
      %t = (bf16[64,128]{1,0:S(5)}, f32[]) tuple(%k, %z)
      %c = (bf16[64,128]{1,0}, bf16[64,128]{1,0:S(5)}, u32[]) copy-start(%k)
      %f = bf16[2,128]{1,0} fusion(%z, %a), kind=kLoop
      ROOT %g = f32[] add(%z, %z)
    }
    """
    none = aot.MemoryReport(arguments=0, outputs=0, aliased=0, temporaries=0)
    report = aot.CompiledReport(
        target=target("h100"),
        device=none,
        host=none,
        kernels=(),
        thunks=(),
        hlo=hlo,
        kept_arguments=(0, 2, 4, 5),
        lower_seconds=0.0,
        compile_seconds=0.0,
    )
    assert report.staging_copies == 2  # the copy, and the fusion that reads an argument


def test_occupancy_by_hand():
    """128 threads: 16 blocks by threads; 4 by 128 registers; 5 by 40 KiB of shared memory."""
    h100 = target("h100")
    assert h100.occupancy(registers=32, shared_bytes=0, threads=128) == 1.0
    assert h100.occupancy(registers=128, shared_bytes=0, threads=128) == 4 / 16
    assert h100.occupancy(registers=32, shared_bytes=40 * 1024, threads=128) == 5 / 16


def test_an_unknown_gpu_is_named():
    with pytest.raises(ValueError, match=r"\['a100', 'h100'\], got 'v100'"):
        target("v100")


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pip install 'flexijax\[aot\]'"):
        aot.compile_for(lambda x: x, (shape(4),), target=target("h100"))
