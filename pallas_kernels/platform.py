"""What depends on the jax version or on the device; nothing else in the package asks for either."""

import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from flexijax.pallas_kernels.placing import placed as placed
from flexijax.pallas_kernels.placing import put as put
from flexijax.pallas_kernels.placing import sharding as sharding

JAX_VERSION = tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:3])

# Part of jit's cache key: a function traced for the CPU is traced again when it is compiled for a
# GPU that this machine does not have.
_target = jax.make_user_context(("", 0))


@contextmanager
def compiling_for(platform: str, *, compute_capability: int = 90) -> Iterator[None]:
    """Makes every choice of this file for `platform` ("cpu" or "gpu") inside a with block.

    compute_capability: of the GPU, ten times the major and once the minor number.
    """
    if platform not in ("cpu", "gpu"):
        raise ValueError(f"platform must be 'cpu' or 'gpu', got {platform!r}")
    with _target((platform, compute_capability)):
        yield


def is_gpu() -> bool:
    """Whether programs are compiled for an NVIDIA GPU: this machine's, or the named target's."""
    return (_target.value[0] or jax.default_backend()) in ("gpu", "cuda")


def device_kind() -> str:
    """ "gpu" or "cpu": what programs are compiled for."""
    return "gpu" if is_gpu() else "cpu"


def compiler_options() -> dict[str, Any]:
    """What XLA is asked for beside its defaults."""
    # LLVM takes half of AVX-512 by default, for what the clock of old CPUs lost by all of it. Whole
    # vectors make a decode step at batch 4 1.03 times as fast, and prefill 1.02 to 1.05 times.
    return {} if is_gpu() else {"xla_cpu_prefer_vector_width": 512}


# Multiprocessors of an A100 and of an H100, by compute capability.
_MULTIPROCESSORS = {80: 108, 90: 132}


def compute_capability() -> int:
    """Of the GPU that programs are compiled for, ten times the major and once the minor number."""
    if _target.value[1] or not is_gpu():
        return _target.value[1] or 90
    return round(10 * float(getattr(jax.devices()[0], "compute_capability", 9.0)))


def multiprocessors() -> int:
    """Of the GPU that programs are compiled for; an H100's where there is none."""
    if _target.value[1] or not is_gpu():
        return _MULTIPROCESSORS.get(compute_capability(), _MULTIPROCESSORS[90])
    return getattr(jax.devices()[0], "core_count", _MULTIPROCESSORS[90])


def free_device_bytes() -> int | None:
    """What the device can still give; None where it has no memory of its own."""
    stats = jax.devices()[0].memory_stats() if is_gpu() else None
    return None if not stats else stats["bytes_limit"] - stats["bytes_in_use"]


# XLA's name for how much host memory it pins for a GPU at most, and what it takes without it.
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_PINNED_LIMIT_GB = 64


def max_pinned_bytes() -> int | None:
    """The most host memory that XLA pins for a GPU; None where there is none."""
    if not is_gpu():
        return None
    named = os.environ.get(PINNED_LIMIT, "")
    return (int(named) if named.isdecimal() else _PINNED_LIMIT_GB) << 30


def check_runs_here(*, implementation: str | None, transfer: str | None) -> None:
    """Raises ValueError for kernels and movers that need a GPU, where there is none."""
    for name, value, needs in (
        ("implementation", implementation, "triton"),
        ("transfer", transfer, "zero_copy"),
    ):
        if value == needs and not is_gpu():
            raise ValueError(f"{name}={value!r} runs on NVIDIA GPUs only: leave it at None here")


def default_implementation() -> str:
    """The kernels that `implementation=None` means here: "pallas" on a GPU, "xla" elsewhere."""
    return "pallas" if is_gpu() else "xla"


def default_transfer() -> str:
    """How pages move between the tiers unless told: "zero_copy" on a GPU, "staged" elsewhere."""
    return "zero_copy" if is_gpu() else "staged"


# Rows, from two on, up to which `models.layers.project` adds up in one order (float32, on a CPU).
MAX_ALIKE_ROWS = 8


def bank_rows(implementation: str | None, rows: int) -> int | None:
    """Rows of an engine whose slots lie in one array; None: all of them.

    A GPU's kernels pass over rows that take no part. XLA's loops on a CPU go over all that they are
    given, so there each row is apart, and a program takes those that run. Measured with the shapes
    of SmolLM2 at 1, 2, 4 and 8 rows: steps as fast as with one array of all, but a program takes a
    quarter longer to compile for each further row.
    """
    xla = (implementation or default_implementation()) == "xla"
    return 1 if xla and not is_gpu() and 1 < rows <= MAX_ALIKE_ROWS else None


def product_parts(*, rows: int, inner: int) -> int:
    """In how many parts a product over `inner` channels is to come, for few rows.

    On a GPU a product of few rows and few columns has too few tiles for all multiprocessors, so XLA
    divides what it adds up over, and adds the parts in a launch of its own unless it is left to
    whoever reads them.
    """
    few = is_gpu() and rows <= 64
    return next((n for n in (8, 4, 2) if few and inner % n == 0 and inner // n >= 512), 1)


# Tokens of a prompt read at once, and at its end, how many tails take no longer than a chunk, and
# how many lengths of keys are attended to. On a CPU attention stops at the diagonal by itself; a
# GPU's looks at all keys that it is given. There chunks of 256 take 1.1 times as long as of 512 or
# 1,024, but leave the least to read of a prompt that begins like another, of which whole chunks are
# shared: a hit takes 0.06 to 0.08 of a miss with 256, and 0.12 of it with 384. A tail of 64 takes
# 0.4 of a chunk's time; on a GPU it reads the weights, which is a seventh.
_PREFILL_SIZES = {"cpu": (256, 64, 2, 1), "gpu": (1024, 128, 7, 4)}


def prefill_sizes() -> tuple[int, int, int, int]:
    """(chunk, tail, tails, key lengths): see `flexijax.cache.prefill_kv.PrefillSpec`."""
    return _PREFILL_SIZES[device_kind()]


def dispatches_ahead() -> bool:
    """Whether decode steps are dispatched before the tokens of those before them are fetched.

    A GPU would wait for Python at every boundary otherwise. What it costs: steps for nothing where
    a request's last one was not known to be. On a CPU, where Python and the steps share the cores,
    that is more than what is gained.
    """
    return is_gpu()


def float32_precision() -> lax.PrecisionLike:
    """For float32 matrix products in kernels: on a GPU three TF32 products on tensor cores.

    Their sum is right to about 21 bits; a single one would keep 10 bits of the operands.
    """
    return lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if is_gpu() else lax.Precision.HIGHEST


@contextmanager
def abstract_gpu(device_kind: str) -> Iterator[None]:
    """Names the GPU to lower Triton kernels for where there is none: later jax asks for it."""
    if JAX_VERSION < (0, 11):
        yield
        return
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    with use_abstract_mesh(mesh), warnings.catch_warnings():
        # The way on is implementation="triton", through jax-triton.
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        yield


def pallas_kernel(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    out_shape: Any,
    num_warps: int,
    num_stages: int = 1,
    aliases: Mapping[int, int] | None = None,
) -> Callable[..., Any]:
    """`pallas_call` through Triton on a GPU, in interpret mode elsewhere.

    aliases: which argument each output is written into, as `input_output_aliases`.
    """
    # Later jax names the compiled kernel after the function, earlier after `name`.
    kernel.__name__ = name
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=not is_gpu(),
    )


def dot4(codes: jax.Array, weight: jax.Array, total: jax.Array) -> jax.Array:
    """total + the sum of four products of bytes: `dp4a` in a kernel, its meaning elsewhere.

    codes: int32[...] of four unsigned bytes each. weight: int32[] of four signed ones. total:
    int32[...].
    """
    if not is_gpu():
        at = 8 * jnp.arange(4, dtype=jnp.int32)
        signed = (weight << (24 - at)) >> 24
        return total + (((codes[..., None] >> at) & 255) * signed).sum(-1)
    [made] = pltriton.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $1, $2, $3;",
        args=[codes, jnp.broadcast_to(weight, codes.shape), total],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.int32)],
    )
    return made


def arrive(count_ref: Any, at: tuple[jax.Array, ...]) -> jax.Array:
    """int32[]: count_ref[at], raised by one as this program of a kernel gets here.

    count_ref: int32[...], shared by programs. What any thread of one of them wrote before it came
    is read, after this, by every thread of those that come later.
    """
    if is_gpu():
        # The threads of a program wait for each other, then one of them adds with the order of
        # acquire and release, which spans the device: what it has seen, the next one sees.
        pltriton.debug_barrier()
    return pltriton.atomic_add(count_ref, at, jnp.int32(1))


def triton_call(
    *arrays: jax.Array,
    kernel: Any,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
    constants: Mapping[str, Any],
) -> Any:
    """A Triton kernel launched through jax-triton; `constants` are its compile-time arguments."""
    # An optional dependency, imported when first used.
    return importlib.import_module("jax_triton").triton_call(
        *arrays,
        kernel=kernel,
        out_shape=out_shape,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        compute_capability=_target.value[1] or None,
        **constants,
    )
