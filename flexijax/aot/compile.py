"""Compiles a program for a GPU that this machine does not have, and says what came out.

The program is lowered on the CPU for CUDA and compiled by XLA's own GPU pipeline against a
description of the target, so that sizes, aliasing and kernels are those of the real thing. Needs
the `aot` extra and no driver.
"""

import functools
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from flexijax.aot import disassembly, launches, thunks
from flexijax.aot.disassembly import KernelReport
from flexijax.aot.launches import Launches
from flexijax.aot.targets import Target
from flexijax.aot.thunks import Thunk
from flexijax.aot.traffic import HOST, array_bytes
from flexijax.pallas_kernels import platform

# Without it the CUDA plugin refuses to load where there is no driver; jax looks when it first
# touches a device.
_NO_DRIVER = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
_UNSTABLE_CALLS = (
    "__gpu$xla.gpu.triton",
    "triton_kernel_call",
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaScaleBiasSoftmax",
)
_COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\][^=\n]*? copy(?:-start)?\(")
_ALIASED = re.compile(r"\(\s*(\d+), \{\}, (?:may|must)-alias\)")
_CALL_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
# What hands an array on without reading it, and kernels, which address host memory themselves.
_HANDS_ON = ("parameter", "tuple", "get-tuple-element", "bitcast", "custom-call")


@dataclass(frozen=True)
class MemoryReport:
    """Bytes in one tier, by the compiler's count: peak is arguments + new outputs + temporaries."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclass(frozen=True)
class CompiledReport:
    """A program compiled for `target`: memory by tier, its kernels, and its optimized HLO text.

    thunks: what the runtime carries out. kept_arguments: which of the flattened leaves the program
    reads; the compiler has no other.
    """

    target: Target
    device: MemoryReport
    host: MemoryReport
    kernels: tuple[KernelReport, ...]
    thunks: tuple[Thunk, ...]
    hlo: str
    kept_arguments: tuple[int, ...]
    lower_seconds: float
    compile_seconds: float

    @property
    def aliased_arguments(self) -> frozenset[int]:
        """Which arguments (index among the flattened leaves) are updated in place."""
        header = self.hlo.partition("entry_computation_layout")[0]
        return frozenset(self.kept_arguments[int(at)] for at in _ALIASED.findall(header))

    @property
    def launches(self) -> Launches:
        """How many launches it takes, and what waits for the host."""
        return launches.launches(self.thunks, launches.trip_counts(self.hlo))

    @property
    def host_callbacks(self) -> int:
        """Calls back into Python in the middle of the program."""
        return sum("callback" in name for name in _CALL_TARGET.findall(self.hlo))

    @property
    def collectives(self) -> int:
        """Exchanges between devices."""
        return len(_COLLECTIVE.findall(self.hlo))

    @property
    def staging_copies(self) -> int:
        """Instructions, kernels aside, that read or write arrays in host memory."""
        found = _INSTRUCTION.findall(self.hlo)
        on_host = {name for name, made, *_ in found if HOST in made and not made.startswith("(")}
        return sum(
            opcode not in _HANDS_ON
            and (HOST in made or not on_host.isdisjoint(re.findall(r"%[\w.-]+", operands)))
            for _, made, opcode, operands in found
        )

    def copies(self, *, at_least: int) -> int:
        """How many instructions copy an array of `at_least` bytes or more."""
        return sum(array_bytes(*match) >= at_least for match in _COPY.findall(self.hlo))


def prepare() -> None:
    """Makes jax load the CUDA plugin without a driver; call it before jax touches a device.

    RuntimeError says what to install.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise RuntimeError(
            "compiling for a GPU needs the CUDA plugin of jax: pip install 'flexijax[aot]'"
        )
    os.environ.setdefault(_NO_DRIVER, "1")
    # LLVM takes a stack trace for every kernel, and an llvm-symbolizer on PATH would spend most of
    # a minute on each: the plugin's library is huge.
    os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")


def compile_for(
    make: Callable[[], Any],
    shapes: Sequence[Any],
    *,
    target: Target,
    kernels_named: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> CompiledReport:
    """Compiles a jitted function for `target` and reports on it.

    Args:
      make: called with `platform.is_gpu()` true; returns the object of `jax.jit`, as it would run.
      shapes: one pytree of arrays or `jax.ShapeDtypeStruct` per argument; memory kinds are taken
        from shardings made by `platform.sharding` ("device" for a leaf that has none).
      kernels_named: report only on kernels that have this in their name.
      progress: called with (stage, done, total) while tracing, compiling and assembling.
    Raises:
      RuntimeError: the `aot` extra is missing, or jax looked for devices before `prepare`.
    """
    prepare()
    tell = progress or (lambda stage, done, total: None)
    gpu = _compile_only_device(target)
    device = platform.sharding("device")
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or device),
        tuple(shapes),
    )
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in _UNSTABLE_CALLS]
    tell("tracing", 0, 1)
    started = time.perf_counter()
    major, minor = target.compute_capability
    with (
        platform.compiling_for("gpu", compute_capability=10 * major + minor),
        platform.abstract_gpu(target.description),
    ):
        lowered = export.export(make(), platforms=["cuda"], disabled_checks=checks)(*placed)
    lower_seconds = time.perf_counter() - started
    tell("tracing", 1, 1)
    tell("compiling", 0, 1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        executable = _compile(lowered.mlir_module(), gpu, folder)
        compile_seconds = time.perf_counter() - started
        tell("compiling", 1, 1)
        carried_out = thunks.read(Path(folder))
        kernels = disassembly.kernels(
            Path(folder),
            carried_out,
            target=target,
            named=kernels_named,
            progress=functools.partial(tell, "assembling kernels of"),
        )
    stats = executable.get_compiled_memory_stats()
    return CompiledReport(
        target=target,
        device=_memory(stats, ""),
        host=_memory(stats, "host_"),
        kernels=kernels,
        thunks=carried_out,
        hlo=executable.hlo_modules()[0].to_string(),
        kept_arguments=tuple(lowered.module_kept_var_idx),
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
    )


def _compile_only_device(target: Target) -> Any:
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target.config, topology="1x1x1"
        )
    except NotImplementedError as error:
        raise RuntimeError(
            "jax looked for devices before flexijax.aot.compile.prepare(): "
            f"call it first, or start Python with {_NO_DRIVER}=1"
        ) from error
    return topology.devices[0]


def _compile(module: str, gpu: Any, dump: str) -> Any:
    """XLA's compile-only path, below jax's public interface: that one drops the memory kinds."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    options = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=1,
        device_assignment=np.array([[0]]),
        # Later XLA writes its emitters' output only when asked with the second flag. Anything more
        # than PTX is a gigabyte of intermediate code for every eight layers.
        env_options_overrides={"xla_dump_to": dump, "xla_dump_emitter_re": "^ptx$"},
    )
    with mlir.make_ir_context():
        return gpu.client.compile(ir.Module.parse(module), xla_client.DeviceList((gpu,)), options)


def _memory(stats: Any, prefix: str) -> MemoryReport:
    names = ("argument", "output", "alias", "temp")
    return MemoryReport(*(getattr(stats, f"{prefix}{name}_size_in_bytes") for name in names))
