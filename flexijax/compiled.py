"""Compiled programs, kept by their static part and the shapes they were compiled for."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

from flexijax.prefill import Program

_executables: dict[Any, Callable[..., Any]] = {}


class Compiler:
    """Compiles functions of a `Program` when they are first needed and counts what that took.

    seconds: spent compiling. programs: how many were compiled. Executables are shared by all
    instances, so a second call with the same shapes compiles nothing.
    """

    def __init__(self, program: Program, progress: Callable[[str, int, int], None] | None) -> None:
        self.program = program
        self.seconds = 0.0
        self.programs = 0
        self._progress = progress

    def run(
        self, function: Callable[..., Any], stage: str, donate: tuple[int, ...], *args: Any
    ) -> Any:
        """function(program, *args), compiled; donate: indices into args. stage: for progress."""
        leaves, structure = jax.tree.flatten(args)
        avals = tuple((leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves)
        key = (function, self.program, structure, avals)
        if key not in _executables:
            started = time.perf_counter()
            if self._progress is not None:
                self._progress(f"compiling {stage}", 0, 1)
            jitted = _jitted(function, tuple(at + 1 for at in donate))
            _executables[key] = jitted.lower(self.program, *args).compile()
            if self._progress is not None:
                self._progress(f"compiling {stage}", 1, 1)
            self.seconds += time.perf_counter() - started
            self.programs += 1
        return _executables[key](*args)


def num_compiled() -> int:
    """How many executables this process holds."""
    return len(_executables)


@cache
def _jitted(function: Callable[..., Any], donate: tuple[int, ...]) -> Any:
    return jax.jit(function, static_argnums=0, donate_argnums=donate)
