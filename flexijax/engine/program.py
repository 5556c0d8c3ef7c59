"""Compiled programs, kept by their static part and the shapes they were compiled for."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

from flexijax.cache import cache as kv
from flexijax.cache.attention import Workspace
from flexijax.cache.cache import Cache
from flexijax.cache.memory import trim_heap
from flexijax.engine.decode import (
    Drawn,
    Rows,
    decode_chunk,
    decode_steps,
    forced_steps,
    rerank,
    rerank_layer,
)
from flexijax.engine.prefill import Program, commit, commit_layer, enter, heads
from flexijax.models.decoder import Params
from flexijax.pallas_kernels import platform

_executables: dict[Any, jax.stages.Compiled] = {}

# LLVM takes half of AVX-512 by default, for what the clock of old CPUs lost by all of it. Whole
# vectors make a decode step at batch 4 1.03 times as fast, and prefill 1.02 to 1.05 times.
_CPU_OPTIONS: dict[str, Any] = {"xla_cpu_prefer_vector_width": 512}


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
        return self.compile(function, stage, donate, *args)(*args)

    def compile(
        self, function: Callable[..., Any], stage: str, donate: tuple[int, ...], *args: Any
    ) -> jax.stages.Compiled:
        """The executable that `run` calls; of args that are not there yet, `ShapeDtypeStruct`s."""
        leaves, structure = jax.tree.flatten(args)
        avals = tuple((leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves)
        key = (function, self.program, structure, avals)
        if key not in _executables:
            # What still runs would be timed as compiling otherwise.
            jax.block_until_ready(args)
            started = time.perf_counter()
            if self._progress is not None:
                self._progress(f"compiling {stage}", 0, 1)
            _executables[key] = _compiled(
                function, tuple(at + 1 for at in donate), self.program, args
            )
            trim_heap()
            if self._progress is not None:
                self._progress(f"compiling {stage}", 1, 1)
            self.seconds += time.perf_counter() - started
            self.programs += 1
        return _executables[key]


def run_commit(
    compiler: Compiler,
    cache: Cache | None,
    workspace: Workspace,
    row: jax.Array,
    blocks: jax.Array,
    length: jax.Array,
    queries: tuple[jax.Array, ...],
    *,
    release: bool = False,
) -> Cache:
    """`prefill.commit`, compiled; cache is donated, None is an empty one.

    release: lets the workspace go, layer by layer on a CPU, where an empty cache is made layer by
    layer too: a prompt then stands in memory once, not twice.
    """
    program = compiler.program
    layout, score = program.layout, program.policy.score
    if platform.is_gpu():
        cache = kv.init(layout, score) if cache is None else cache
        made = compiler.run(commit, "commit", (0,), cache, workspace, row, blocks, length, queries)
        if release:
            jax.tree.map(lambda leaf: leaf.delete(), workspace)
        return made
    layers, hosts = [], []
    for at in range(layout.shape.num_layers):
        pair = (
            kv.init_layer(layout, score, at)
            if cache is None
            else (cache.layers[at], cache.host[at])
        )
        k, v = workspace.k[at], workspace.v[at]
        args = (*pair, k, v, row, blocks, length, queries[at], *heads(program, at))
        held, host = compiler.run(commit_layer, "commit", (0, 1), *args)
        if release:
            # Layers are worked on in the background: all of them would be allocated at once.
            jax.block_until_ready((held, host))
            k.delete()
            v.delete()
        layers.append(held)
        hosts.append(host)
    both = (tuple(layers), tuple(hosts))
    if cache is None:
        return enter(kv.init_tables(layout, *both), row, blocks, length)
    return enter(dataclasses.replace(cache, layers=both[0], host=both[1]), row, blocks, length)


def compile_decode(compiler: Compiler, params: Params, rows: Rows) -> None:
    """Compiles what `run_decode` runs on a CPU, before there is a cache.

    Compiling the decode chunk of SmolLM2 takes 330 MB and a rerank 100, as much as the cache of 8
    thousand tokens, and half of it is free again when the cache comes. Elsewhere the cache lies in
    another memory.
    """
    if platform.is_gpu():
        return
    cache = _abstract_cache(compiler.program)
    counters, table, lengths = cache.counters, cache.block_table, cache.lengths
    steps = compiler.compile(
        decode_steps, "decode", (1,), params, cache.layers, table, lengths, rows
    )
    layers, _, _, _, queries = platform.placed(steps.out_info)
    tally = (counters.promoted, counters.offloaded)
    for held, host, counted, q in zip(layers, cache.host, counters.heads, queries, strict=True):
        if host is not None:
            args = (held, host, tally, counted, table, lengths, lengths, rows.active, q)
            compiler.compile(rerank_layer, "rerank", (0, 1, 2, 3), *args)


@functools.cache
def _abstract_cache(program: Program) -> Cache:
    # Kept, since it takes 50 ms and every call of `generate` asks for it.
    return kv.abstract(program.layout, program.policy.score)


def run_decode(
    compiler: Compiler, params: Params, cache: Cache, rows: Rows
) -> tuple[Cache, Rows, Drawn]:
    """`decode.decode_chunk`, compiled; cache is donated.

    On a GPU it is one program. XLA's CPU compiler spends most of its time on the rerank, which it
    compiles anew for each layer, so there one program per kind of layer is called for all of them.
    """
    if platform.is_gpu():
        return compiler.run(decode_chunk, "decode", (1,), params, cache, rows)
    layers, lengths, rows, drawn, queries = compiler.run(
        decode_steps, "decode", (1,), params, cache.layers, cache.block_table, cache.lengths, rows
    )
    return _rerank(compiler, cache, layers, lengths, rows.active, queries), rows, drawn


def run_forced(
    compiler: Compiler, params: Params, cache: Cache, tokens: jax.Array, active: jax.Array
) -> tuple[Cache, jax.Array]:
    """`decode.forced_steps` and the rerank, compiled: the cache, and logits float32[R, B, V]."""
    layers, lengths, logits, queries = compiler.run(
        forced_steps,
        "forced decode",
        (1,),
        params,
        cache.layers,
        cache.block_table,
        cache.lengths,
        tokens,
        active,
    )
    return _rerank(compiler, cache, layers, lengths, active, queries), logits


def _rerank(compiler: Compiler, cache: Cache, layers, lengths, active, queries) -> Cache:
    layer = functools.partial(compiler.run, rerank_layer, "rerank", (0, 1, 2, 3))
    return rerank(compiler.program, cache, layers, lengths, active, queries, layer)


def num_compiled() -> int:
    """How many executables this process holds."""
    return len(_executables)


def forget_compiled() -> None:
    """Lets go of all executables; what is needed again is compiled again.

    Each holds memory maps, of which Linux gives a process 65,530; a compiler without one crashes.
    """
    _executables.clear()
    _abstract_cache.cache_clear()
    jax.clear_caches()


def _compiled(
    function: Callable[..., Any], donate: tuple[int, ...], program: Program, args: tuple[Any, ...]
) -> jax.stages.Compiled:
    """The executable of function(program, *args); donate: indices into both."""

    # A function of its own each time: jax keeps what it traced for as long as the function lives,
    # and all of a run's programs are traced just once.
    @functools.wraps(function)
    def once(program: Program, *args: Any) -> Any:
        return function(program, *args)

    options = None if platform.is_gpu() else _CPU_OPTIONS
    jitted = jax.jit(once, static_argnums=0, donate_argnums=donate)
    return jitted.lower(program, *args).compile(compiler_options=options)
