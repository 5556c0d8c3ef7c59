"""The programs of a run, one after the other: commit, decode steps, what follows them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.arrays import ChunkEnd, Prompt
from flexijax.cache.cache import Cache, init_layer, init_tables, reset_row
from flexijax.cache.refit import is_due, refit_layer
from flexijax.engine.batch import BatchState, SampledTokens
from flexijax.engine.decode import (
    Groups,
    Queries,
    decode_steps,
    end_chunk_layer,
    teacher_forced_steps,
)
from flexijax.engine.inventory import decode_calls
from flexijax.engine.prefill import commit_layer, head_arrays
from flexijax.engine.program import Program, Runner
from flexijax.models.decoder import Params
from flexijax.pallas_kernels import platform


def run_commit(
    runner: Runner,
    program: Program,
    cache: Cache | None,
    prompts: tuple[Prompt, ...],
    *,
    release: bool = False,
) -> Cache:
    """A prompt into its row of the cache, which is donated; None is an empty one.

    prompts: of each layer. release: lets the prompt's keys and values go, layer by layer; an empty
    cache is made layer by layer too, so that a prompt stands in memory once, not twice.
    """
    layout, layers = program.layout, []
    for layer, prompt in enumerate(prompts):
        held = init_layer(layout, program.policy, layer) if cache is None else cache.layers[layer]
        args = (held, prompt, head_arrays(layout, layer))
        made = runner.run("commit", commit_layer, program.groups[layer], args, donate=(0,))
        if release:
            # Layers are worked on in the background: all of them would be allocated at once.
            jax.block_until_ready(made)
            prompt.k.delete()
            prompt.v.delete()
        layers.append(made)
    made = init_tables(layout, tuple(layers))
    if cache is not None:
        made = dataclasses.replace(cache, layers=tuple(layers))
    return reset_row(made, prompts[0].row, prompts[0].blocks, prompts[0].length)


def compile_decode(runner: Runner, program: Program, params: Params, batch: BatchState) -> None:
    """Compiles what `run_decode` runs, before there is a cache.

    Compiling the decode steps of SmolLM2 takes 330 MB and a rerank 100, as much as the cache of 8
    thousand tokens, and half of it is free again when the cache comes.
    """
    for call in decode_calls(program, params, batch):
        runner.compile(call.stage, call.function, call.static, call.args, donate=call.donate)


def run_decode(
    runner: Runner, program: Program, params: Params, cache: Cache, batch: BatchState
) -> tuple[Cache, BatchState, SampledTokens]:
    """R decode steps of all requests and what follows them; cache is donated."""
    args = (params, _groups(cache), cache.block_table, cache.lengths, batch)
    groups, end, batch, sampled, queries = runner.run(
        "decode", decode_steps, program, args, donate=(1,)
    )
    return _end_chunk(runner, program, cache, groups, end, queries), batch, sampled


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
    active = jax.device_put(active, platform.sharding())
    args = (params, _groups(cache), cache.block_table, cache.lengths, tokens, active)
    groups, end, logits, queries = runner.run(
        "teacher-forced decode", teacher_forced_steps, program, args, donate=(1,)
    )
    return _end_chunk(runner, program, cache, groups, end, queries), logits


def run_refit(
    runner: Runner, program: Program, cache: Cache, *, row: int, prompt: int, before: int
) -> Cache:
    """After a chunk of steps: row `row` fitted anew where `refit.is_due`; cache is donated.

    prompt: its tokens. before: tokens held before the chunk.
    """
    if not is_due(program.refit_rule, program.chunk_steps, prompt=prompt, before=before):
        return cache
    at = (_index(row), cache.block_table, cache.lengths)
    layers = tuple(
        runner.run("refit", refit_layer, groups, (layer, *at), donate=(0,))
        for groups, layer in zip(program.groups, cache.layers, strict=True)
    )
    return dataclasses.replace(cache, layers=layers)


def _end_chunk(
    runner: Runner,
    program: Program,
    cache: Cache,
    groups: Groups,
    end: ChunkEnd,
    queries: Queries,
) -> Cache:
    """The cache after R steps; `cache` is the one from before them, groups those after them."""
    layers = [
        dataclasses.replace(layer, groups=mine)
        for layer, mine in zip(cache.layers, groups, strict=True)
    ]
    for layer in program.chunk_ends:
        args = (layers[layer], end, queries[layer], _index(layer))
        name = "end of a chunk"
        layers[layer] = runner.run(name, end_chunk_layer, program.groups[layer], args, donate=(0,))
    chunks = cache.chunks + end.active.astype(jnp.int32)
    return Cache(tuple(layers), cache.block_table, end.held, chunks)


@functools.cache
def _index(number: int) -> jax.Array:
    """int32[], placed as a program's results are: what differs in that is compiled twice."""
    return jax.device_put(np.int32(number), platform.sharding())


def _groups(cache: Cache) -> Groups:
    return tuple(layer.groups for layer in cache.layers)
