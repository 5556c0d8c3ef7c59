"""A run's programs: what each is compiled for, `jax.jit` of it, and a timer of compiling."""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import jax

from flexijax.cache.cache import group_programs
from flexijax.cache.layout import CacheLayout, GroupProgram
from flexijax.cache.memory import trim_heap
from flexijax.cache.prefill_kv import PrefillSpec
from flexijax.models.decoder import DecoderLike
from flexijax.pallas_kernels import platform
from flexijax.policies.base import Policy

Progress: TypeAlias = Callable[[str, int, int], None]

# LLVM takes half of AVX-512 by default, for what the clock of old CPUs lost by all of it. Whole
# vectors make a decode step at batch 4 1.03 times as fast, and prefill 1.02 to 1.05 times.
_CPU_OPTIONS: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything static about a run; hashable. implementation, transfer: see `CacheConfig`.

    suppress_ids: tokens that are never generated.
    """

    decoder: DecoderLike
    layout: CacheLayout
    policy: Policy
    implementation: str | None = None
    transfer: str | None = None
    suppress_ids: tuple[int, ...] = ()

    @property
    def chunk_steps(self) -> int:
        """Decode steps of one program, after which heads are reranked and tokens evicted (R)."""
        return self.layout.sizes.chunk_steps

    @functools.cached_property
    def groups(self) -> tuple[tuple[GroupProgram, ...], ...]:
        """Per layer, what the programs over its head groups are compiled for."""
        return tuple(
            group_programs(
                self.layout,
                self.policy,
                layer,
                implementation=self.implementation,
                transfer=self.transfer,
            )
            for layer in range(len(self.layout.groups))
        )

    def prefill_spec(self) -> PrefillSpec:
        """What reading a prompt for this program alone is compiled for."""
        return prefill_spec((self,))


def prefill_spec(programs: tuple[Program, ...]) -> PrefillSpec:
    """What reading a prompt for all the programs is compiled for; they are of one model and size.

    Raises ValueError where they differ in what a prompt is read with.
    """
    found = {(p.decoder, p.layout.sizes.shape, p.layout.sizes.max_tokens) for p in programs}
    found_with = {(p.layout.sizes.dtype, p.implementation) for p in programs}
    if len(found) != 1 or len(found_with) != 1:
        raise ValueError(
            "one reading of a prompt serves programs of one model, length, dtype and "
            f"implementation only, not {sorted(map(str, found | found_with))}"
        )
    sizes = programs[0].layout.sizes
    policies = [program.policy for program in programs]
    return PrefillSpec(
        shape=sizes.shape,
        tokens=sizes.max_tokens,
        dtype=sizes.dtype,
        window=max([1, *(policy.prompt_window or 0 for policy in policies)]),
        observers=tuple(dict.fromkeys(p for p in policies if p.prompt_window is None)),
        implementation=programs[0].implementation,
    )


def jitted(function: Callable[..., Any], static: Any, donate: tuple[int, ...]) -> Any:
    """`jax.jit` of function(static, *args), the same object for the same static part.

    static: hashable. donate: indices into args. What a report or a test compiles for another device
    comes from here too, so that it is what runs.
    """
    return _jitted(function, static, donate, platform.is_gpu())


@functools.lru_cache(maxsize=256)
def _jitted(function: Callable[..., Any], static: Any, donate: tuple[int, ...], gpu: bool) -> Any:
    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        if (runner := _running.get()) is not None:
            runner.begin_compiling()
        return function(static, *args)

    return jax.jit(traced, donate_argnums=donate, compiler_options={} if gpu else _CPU_OPTIONS)


class Runner:
    """Runs jitted functions and counts what compiling them took.

    seconds: spent tracing and compiling. programs: how many were compiled. Executables are shared
    by all instances, so a second call with the same shapes compiles nothing.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.seconds = 0.0
        self.programs = 0
        self.progress = progress
        self._call: tuple[str, Any] = ("", ())
        self._began: float | None = None
        self._ended = 0.0

    def run(
        self,
        stage: str,
        function: Callable[..., Any],
        static: Any,
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> Any:
        """function(static, *args), compiled if need be. stage: for progress."""
        return self._watched(stage, jitted(function, static, donate), args)

    def compile(
        self,
        stage: str,
        function: Callable[..., Any],
        static: Any,
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Compiled:
        """Compiles what `run` would, which then need not; args: of shapes, where not there yet."""
        program = jitted(function, static, donate)
        return self._watched(stage, lambda *args: program.lower(*args).compile(), args)

    def begin_compiling(self) -> None:
        """Called while a function is traced, which is before it is compiled."""
        if self._began is not None:
            return
        stage, args = self._call
        # What still runs would be timed as compiling otherwise.
        jax.block_until_ready([leaf for leaf in jax.tree.leaves(args) if _is_there(leaf)])
        self._began = self._ended = time.perf_counter()
        if self.progress is not None:
            self.progress(f"compiling {stage}", 0, 1)

    def end_compiling(self) -> None:
        """Called whenever the compiler is done with something."""
        self._ended = time.perf_counter()

    def _watched(self, stage: str, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._call, self._began = (stage, args), None
        token = _running.set(self)
        try:
            made = call(*args)
        finally:
            _running.reset(token)
            self._call = ("", ())
        if self._began is not None:
            self.seconds += self._ended - self._began
            self.programs += 1
            trim_heap()
            if self.progress is not None:
                self.progress(f"compiling {stage}", 1, 1)
        return made


_running: contextvars.ContextVar[Runner | None] = contextvars.ContextVar("running", default=None)


def _is_there(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_deleted()


def _on_duration(event: str, duration_secs: float, **_: Any) -> None:
    if event.endswith("/backend_compile_duration") and (runner := _running.get()) is not None:
        runner.end_compiling()


jax.monitoring.register_event_duration_secs_listener(_on_duration)


def num_compiled() -> int:
    """How many functions of ours this process holds compiled, see `forget_compiled`."""
    return _jitted.cache_info().currsize


def forget_compiled() -> None:
    """Lets go of all executables; what is needed again is compiled again.

    Each holds memory maps, of which Linux gives a process 65,530; a compiler without one crashes.
    """
    _jitted.cache_clear()
    jax.clear_caches()
