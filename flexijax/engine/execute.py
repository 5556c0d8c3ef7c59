"""The programs of a run, one after the other: commit, decode steps, what follows them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flexijax.cache.arrays import Prompt
from flexijax.cache.banks import together
from flexijax.cache.cache import Bank, Cache, LayerCache, Standing, reset_row
from flexijax.cache.prefill_kv import PrefillKV, PrefillSpec
from flexijax.cache.refit import is_due, refit_layer
from flexijax.engine.batch import BatchState, SampledTokens
from flexijax.engine.decode import (
    BankEnd,
    Groups,
    Held,
    decode_steps,
    end_chunk_layer,
    teacher_forced_steps,
)
from flexijax.engine.inventory import ProgramCall, step_arrays
from flexijax.engine.prefill import commit_layer, head_arrays, load_prefix
from flexijax.engine.program import Program, Runner
from flexijax.models.decoder import Params
from flexijax.pallas_kernels import placing, platform


class Place(NamedTuple):
    """Where a prompt goes: row int32[] of a bank, blocks int32[P], its length in tokens int32[].

    start: int32[], tokens whose pages the blocks hold already.
    """

    bank: int
    row: jax.Array
    blocks: jax.Array
    length: jax.Array
    start: jax.Array

    @classmethod
    def of(
        cls, program: Program, row: int, blocks: Collection[int], length: int, start: int = 0
    ) -> Place:
        """blocks: one block id a page, at least ceil(length / page) of them."""
        sizes = program.layout.sizes
        table = np.zeros(sizes.pages, np.int32)
        table[: len(blocks)] = list(blocks)
        bank, row = divmod(row, sizes.bank_rows)
        return cls(bank, as_index(row), platform.put(table), as_index(length), as_index(start))


def run_load_prefix(
    runner: Runner, program: Program, cache: Cache, layer: int, kv: PrefillKV, place: Place
) -> PrefillKV:
    """The tokens of a prompt that are in the cache already, of one layer; kv is donated."""
    heads = head_arrays(program.layout, layer)
    args = (cache.pool(layer), heads, place.blocks, place.start, kv)
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
    at = (place.row, place.blocks, place.length, place.start, as_index(layer))
    prompt = Prompt(kv.k, kv.v, kv.queries, observed, *at)
    args = (cache.layer(layer, place.bank), prompt, head_arrays(program.layout, layer))
    made = runner.run("commit", commit_layer, program.groups[layer], args, donate=(0,))
    return cache.with_layer(layer, place.bank, made)


def run_admit(cache: Cache, place: Place) -> Cache:
    """The cache, donated, with the row in use: when all layers of its prompt are there."""
    standing = cache.banks[place.bank].standing
    made = reset_row(standing, place.row, place.blocks, place.length)
    return cache.with_standing(place.bank, made)


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
    banks: Sequence[int],
    batch: BatchState,
    due: np.ndarray,
) -> tuple[Cache, BatchState, SampledTokens]:
    """T = `program.steps` decode steps of the requests of some banks, and the ends of chunks.

    program: of as many rows as the banks have, which batch and due are of. cache: donated. due:
    bool[B], rows whose chunk ends with these steps.
    """
    args = (params, *step_arrays(cache, banks), platform.put(due), batch)
    held, standing, batch, sampled, ends = runner.run(
        "decode", decode_steps, program.decoding, args, donate=(2,)
    )
    made = after_steps(cache, banks, held, standing)
    for bank, end, mine in zip(banks, ends, np.split(due, len(banks)), strict=True):
        if mine.any():
            made = _end_chunk(runner, program, made, bank, end)
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
    active, banks = platform.put(active), range(len(cache.banks))
    args = (params, *step_arrays(cache, banks), tokens, active)
    held, standing, logits, ends = runner.run(
        "teacher-forced decode", teacher_forced_steps, program.decoding, args, donate=(2,)
    )
    made = after_steps(cache, banks, held, standing)
    for bank, end in zip(banks, ends, strict=True):
        made = _end_chunk(runner, program, made, bank, end)
    return made, logits


def run_refit(
    runner: Runner, program: Program, cache: Cache, *, row: int, prompt: int, before: int
) -> Cache:
    """After a chunk of steps: row `row` fitted anew where `refit.is_due`; cache is donated.

    prompt: its tokens. before: tokens held before the chunk.
    """
    if not is_due(program.refit_rule, program.chunk_steps, prompt=prompt, before=before):
        return cache
    bank, row = divmod(row, program.layout.sizes.bank_rows)
    standing = cache.banks[bank].standing
    at = (as_index(row), standing.block_table, standing.lengths)
    for layer, groups in enumerate(program.groups):
        args = (cache.layer(layer, bank), *at)
        made = runner.run("refit", refit_layer, groups, args, donate=(0,))
        cache = cache.with_layer(layer, bank, made)
    return cache


def after_steps(
    cache: Cache, banks: Sequence[int], held: Held, standing: tuple[Standing, ...]
) -> Cache:
    """`cache` from before some steps of some banks with what they left."""
    made = list(cache.banks)
    for bank, groups, stands in zip(banks, held.banks, standing, strict=True):
        made[bank] = Bank(_with_groups(made[bank].layers, groups), stands)
    shared = cache.shared
    if shared is not None:
        [shared] = _with_groups((shared,), (held.shared,))
    return Cache(_with_groups(cache.pools, held.pools), tuple(made), shared)


def _with_groups(layers: tuple[LayerCache, ...], groups: Groups) -> tuple[LayerCache, ...]:
    return tuple(
        dataclasses.replace(layer, groups=tuple(map(together, layer.groups, mine)))
        for layer, mine in zip(layers, groups, strict=True)
    )


def _end_chunk(runner: Runner, program: Program, cache: Cache, bank: int, of: BankEnd) -> Cache:
    """The cache, donated, after what the ends of a bank's chunks bring."""
    for layer in program.chunk_ends:
        args = (cache.layer(layer, bank), BankEnd(of.end, of.queries[layer]), as_index(layer))
        name = "end of a chunk"
        made = runner.run(name, end_chunk_layer, program.groups[layer], args, donate=(0,))
        cache = cache.with_layer(layer, bank, made)
    return cache


def as_index(number: int) -> jax.Array:
    """int32[], placed as a program's results are: what differs in that is compiled twice."""
    return _as_index(number, placing.current_mesh())


@functools.lru_cache(maxsize=65536)
def _as_index(number: int, mesh: Mesh | None) -> jax.Array:
    return platform.put(np.int32(number))
