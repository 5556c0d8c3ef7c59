"""Seconds of a kernel, of a copy, of the stages of a run."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.timing import median
from flexijax.engine.program import Runner


def seconds_of(
    function: Callable[..., tuple[Any, Any]],
    sets: Sequence[tuple[Any, tuple[Any, ...]]],
    *,
    calls: int,
    rounds: int,
) -> float:
    """The median time of one call, of `calls` times all sets in one program.

    One program, since starting one takes as long as a small kernel. Each call waits for the one
    before, and the sum of all that it returns is taken, so that nothing of it can be left out: two
    small kernels are timed with it. function: (state, *args) -> (out, state). sets: (state, args)
    that take turns, of equal shapes; the states are donated, and updated in place. The first leaf
    of args is a small array.
    """
    run = jax.jit(functools.partial(_chained, function, calls), donate_argnums=0)
    states, arguments = (tuple(some) for some in zip(*sets, strict=True))
    states, _ = jax.block_until_ready(run(states, arguments))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        states, _ = jax.block_until_ready(run(states, arguments))
        times.append((time.perf_counter() - started) / (calls * len(arguments)))
    return median(times)


def _chained(
    function: Callable[..., tuple[Any, Any]],
    calls: int,
    states: tuple[Any, ...],
    arguments: tuple[tuple[Any, ...], ...],
) -> tuple[tuple[Any, ...], jax.Array]:
    def turn(_, carry: tuple[tuple[Any, ...], jax.Array]) -> tuple[tuple[Any, ...], jax.Array]:
        states, before = carry
        after = []
        for state, args in zip(states, arguments, strict=True):
            leaves, structure = jax.tree.flatten(args)
            # Nought, which the compiler cannot know.
            leaves[0] = leaves[0] + before.astype(leaves[0].dtype)
            out, state = function(state, *jax.tree.unflatten(structure, leaves))
            after.append(state)
            if sums := [leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(out)]:
                before = jnp.isnan(jnp.stack(sums).sum()).astype(jnp.float32)
        return tuple(after), before

    return lax.fori_loop(0, calls, turn, (states, jnp.zeros((), jnp.float32)))


def seconds_in_place(
    function: Callable[..., Any], state: Any, *, calls: int, rounds: int
) -> tuple[float, Any]:
    """The median time of one call of function(state) -> state, which donates; and the last state.

    For what takes long against starting a program.
    """
    state = jax.block_until_ready(function(state))
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            state = function(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - started) / calls)
    return median(times), state


class StageTimes(Runner):
    """A runner that waits for every program, and keeps how long each took, by stage.

    seconds_of: per stage, the times of all calls that compiled nothing.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self.seconds_of: dict[str, list[float]] = defaultdict(list)

    def run(
        self,
        stage: str,
        function: Callable[..., Any],
        static: Any,
        args: tuple[Any, ...],
        donate: tuple[int, ...] = (),
    ) -> Any:
        """See `Runner.run`."""
        jax.block_until_ready(
            [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array)]
        )
        programs, started = self.programs, time.perf_counter()
        made = jax.block_until_ready(super().run(stage, function, static, args, donate))
        if self.programs == programs:
            self.seconds_of[stage].append(time.perf_counter() - started)
        return made
