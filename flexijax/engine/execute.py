"""The programs of a run, one after the other: commit, decode steps, what follows them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.arrays import ChunkEnd, Prompt
from flexijax.cache.cache import Cache, reset_row
from flexijax.cache.prefill_kv import PrefillKV, PrefillSpec, replaced
from flexijax.cache.refit import is_due, refit_layer
from flexijax.engine.batch import BatchState, SampledTokens
from flexijax.engine.decode import (
    Groups,
    Queries,
    Standing,
    decode_steps,
    end_chunk_layer,
    teacher_forced_steps,
)
from flexijax.engine.inventory import ProgramCall
from flexijax.engine.prefill import commit_layer, head_arrays, load_prefix
from flexijax.engine.program import Program, Runner
from flexijax.models.decoder import Params
from flexijax.pallas_kernels import platform


class Place(NamedTuple):
    """Where a prompt goes: row int32[], blocks int32[P], and its length in tokens int32[].

    start: int32[], tokens whose pages the blocks hold already.
    """

    row: jax.Array
    blocks: jax.Array
    length: jax.Array
    start: jax.Array

    @classmethod
    def of(
        cls, program: Program, row: int, blocks: Collection[int], length: int, start: int = 0
    ) -> Place:
        """blocks: one block id a page, at least ceil(length / page) of them."""
        table = np.zeros(program.layout.sizes.pages, np.int32)
        table[: len(blocks)] = list(blocks)
        return cls(as_index(row), platform.put(table), as_index(length), as_index(start))


def run_load_prefix(
    runner: Runner, program: Program, cache: Cache, layer: int, kv: PrefillKV, place: Place
) -> PrefillKV:
    """The tokens of a prompt that are in the cache already, of one layer; kv is donated."""
    heads = head_arrays(program.layout, layer)
    args = (cache.layers[layer], heads, place.blocks, place.start, kv)
    groups = program.groups[layer]
    return runner.run("prefix", load_prefix, groups, args, donate=(4,))


def run_commit(
    runner: Runner,
    program: Program,
    spec: PrefillSpec,
    cache: Cache,
    layer: int,
    kv: PrefillKV,
    place: Place,
) -> Cache:
    """A layer of a prompt into its row of the cache, which is donated; see `run_admit`."""
    at = spec.observers.index(program.policy) if program.policy in spec.observers else None
    observed = () if at is None else kv.observed[at]
    prompt = Prompt(kv.k, kv.v, kv.queries, observed, *place, as_index(layer))
    args = (cache.layers[layer], prompt, head_arrays(program.layout, layer))
    made = runner.run("commit", commit_layer, program.groups[layer], args, donate=(0,))
    return dataclasses.replace(cache, layers=replaced(cache.layers, layer, made))


def run_admit(cache: Cache, place: Place) -> Cache:
    """The cache, donated, with the row in use: when all layers of its prompt are there."""
    return reset_row(cache, place.row, place.blocks, place.length)


def compile_calls(runner: Runner, calls: Iterable[ProgramCall]) -> int:
    """Compiles what will be run; how many programs there were to compile."""
    before = runner.programs
    for call in calls:
        runner.compile(call.stage, call.function, call.static, call.args, donate=call.donate)
    return runner.programs - before


def run_decode(
    runner: Runner,
    program: Program,
    params: Params,
    cache: Cache,
    batch: BatchState,
    due: np.ndarray,
) -> tuple[Cache, BatchState, SampledTokens]:
    """T = `program.steps` decode steps of all requests, and the ends of chunks; cache is donated.

    due: bool[B], rows whose chunk ends with these steps.
    """
    flags = platform.put(due)
    args = (params, _groups(cache), _standing(cache), flags, batch)
    groups, end, batch, sampled, queries = runner.run(
        "decode", decode_steps, program, args, donate=(1,)
    )
    made = _after_steps(cache, groups, end, flags)
    if due.any():
        made = _end_chunk(runner, program, made, end, queries)
    return made, batch, sampled


def run_teacher_forced(
    runner: Runner,
    program: Program,
    params: Params,
    cache: Cache,
    tokens: jax.Array,
    active: jax.Array,
) -> tuple[Cache, jax.Array]:
    """`teacher_forced_steps` and what follows them: the cache, and logits float32[R, B, V]."""
    # It comes back as it is, and what is placed otherwise than a result is compiled for once more.
    active = platform.put(active)
    args = (params, _groups(cache), _standing(cache), tokens, active)
    groups, end, logits, queries = runner.run(
        "teacher-forced decode", teacher_forced_steps, program, args, donate=(1,)
    )
    made = _after_steps(cache, groups, end, active)
    return _end_chunk(runner, program, made, end, queries), logits


def run_refit(
    runner: Runner, program: Program, cache: Cache, *, row: int, prompt: int, before: int
) -> Cache:
    """After a chunk of steps: row `row` fitted anew where `refit.is_due`; cache is donated.

    prompt: its tokens. before: tokens held before the chunk.
    """
    if not is_due(program.refit_rule, program.chunk_steps, prompt=prompt, before=before):
        return cache
    at = (as_index(row), cache.block_table, cache.lengths)
    layers = tuple(
        runner.run("refit", refit_layer, groups, (layer, *at), donate=(0,))
        for groups, layer in zip(program.groups, cache.layers, strict=True)
    )
    return dataclasses.replace(cache, layers=layers)


def _after_steps(cache: Cache, groups: Groups, end: ChunkEnd, due: jax.Array) -> Cache:
    """`cache` from before some steps with what they left: groups, and where rows stand."""
    layers = tuple(
        dataclasses.replace(layer, groups=mine)
        for layer, mine in zip(cache.layers, groups, strict=True)
    )
    settled = jnp.where(due, end.held, cache.settled)
    return Cache(layers, cache.block_table, end.held, settled, cache.chunks)


def _end_chunk(
    runner: Runner, program: Program, cache: Cache, end: ChunkEnd, queries: Queries
) -> Cache:
    """The cache, donated, after what the ends of its rows' chunks bring."""
    layers = list(cache.layers)
    for layer in program.chunk_ends:
        args = (layers[layer], end, queries[layer], as_index(layer))
        name = "end of a chunk"
        layers[layer] = runner.run(name, end_chunk_layer, program.groups[layer], args, donate=(0,))
    chunks = cache.chunks + end.active.astype(jnp.int32)
    return dataclasses.replace(cache, layers=tuple(layers), chunks=chunks)


@functools.lru_cache(maxsize=65536)
def as_index(number: int) -> jax.Array:
    """int32[], placed as a program's results are: what differs in that is compiled twice."""
    return platform.put(np.int32(number))


def _groups(cache: Cache) -> Groups:
    return tuple(layer.groups for layer in cache.layers)


def _standing(cache: Cache) -> Standing:
    return Standing(cache.block_table, cache.lengths, cache.settled)
