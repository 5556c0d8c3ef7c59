"""`jax.jit` of a function and its static part: the same object each time, within bounds."""

from __future__ import annotations

import contextvars
import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from flexijax.cache.over_mesh import on_shards
from flexijax.pallas_kernels import platform

# Of the memory maps that Linux gives a process; see `make_room`.
_SHARE = 0.6


class Compiling(Protocol):
    """Who is told that a function is traced, and when the compiler is done with something."""

    def begin_compiling(self) -> None: ...

    def end_compiling(self) -> None: ...


running: contextvars.ContextVar[Compiling | None] = contextvars.ContextVar("running", default=None)
_programs: OrderedDict[Any, Any] = OrderedDict()


def jitted(
    function: Callable[..., Any], static: Any, donate: tuple[int, ...], mesh: Mesh | None = None
) -> Any:
    """`jax.jit` of function(static, *args), the same object for the same static part.

    static: hashable. donate: indices into args. mesh: over whose devices it runs, each on its
    shards; None: on one. What a report or a test compiles for another device
    comes from here too, so that it is what runs.
    """
    key = (function, static, donate, platform.device_kind(), mesh)
    if key not in _programs:
        _programs[key] = _jit(function, static, donate, mesh)
    _programs.move_to_end(key)
    return _programs[key]


def _jit(
    function: Callable[..., Any], static: Any, donate: tuple[int, ...], mesh: Mesh | None
) -> Any:
    # A function of its own each time, since jax keeps what it compiled for as long as that lives.
    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        if (runner := running.get()) is not None:
            runner.begin_compiling()
        if mesh is not None:
            return on_shards(functools.partial(function, static), mesh, args)
        return function(static, *args)

    return jax.jit(traced, donate_argnums=donate, compiler_options=platform.compiler_options())


def make_room() -> None:
    """Lets go of the programs that were used longest ago while memory maps are running short.

    Each executable on a CPU holds maps, about 3,150 for the programs of SmolLM2 at one length and
    batch; Linux allows a process 65,530, and a compiler without one crashes.
    """
    while len(_programs) > 1 and memory_maps() > _SHARE * _max_memory_maps():
        for _ in range(-(-len(_programs) // 8)):
            _programs.popitem(last=False)


def memory_maps() -> int:
    """How many memory maps this process has; 0 where the system does not tell."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@functools.cache
def _max_memory_maps() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 65530


def num_compiled() -> int:
    """How many executables of ours this process holds."""
    return sum(program._cache_size() for program in _programs.values())


def forget_compiled() -> None:
    """Lets go of all executables; what is needed again is compiled again."""
    _programs.clear()
    jax.clear_caches()


def _on_duration(event: str, duration_secs: float, **_: Any) -> None:
    if event.endswith("/backend_compile_duration") and (runner := running.get()) is not None:
        runner.end_compiling()


jax.monitoring.register_event_duration_secs_listener(_on_duration)
