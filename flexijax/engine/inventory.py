"""Every program of a run with the shapes it is called with: to compile it early, or elsewhere.

A report or a test that goes through this compiles what `generate` runs, by the same function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.cache.arrays import Prompt, chunk_end
from flexijax.cache.banks import only
from flexijax.cache.cache import Cache, LayerCache, Standing, abstract, keeps_all_by_block, kind
from flexijax.cache.over_mesh import placed
from flexijax.cache.prefill_kv import abstract_prefill_kv, last_pieces, pieces
from flexijax.cache.refit import refit_layer
from flexijax.engine.batch import empty_batch
from flexijax.engine.decode import BankEnd, Groups, Held, Queries, decode_steps, end_chunk_layer
from flexijax.engine.first_token import FirstToken, first_token
from flexijax.engine.jit_cache import jitted
from flexijax.engine.prefill import (
    PrefillProgram,
    commit_layer,
    embed_prompt,
    head_arrays,
    load_prefix,
    prefill_chunk,
    prefill_last_layer,
)
from flexijax.engine.program import Program
from flexijax.engine.sampling import Sampling, SamplingRows
from flexijax.models.decoder import Params
from flexijax.pallas_kernels import platform


@dataclasses.dataclass(frozen=True)
class ProgramCall:
    """One program. stage: what progress and reports call it. calls: of it in a prompt or a chunk.

    function, static, donate: see `engine.program.jitted`. args: `jax.ShapeDtypeStruct`s or arrays.
    """

    stage: str
    function: Callable[..., Any]
    static: Any
    args: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    calls: int = 1

    def jitted(self) -> Any:
        """The very object that runs."""
        return jitted(self.function, self.static, self.donate)


def all_calls(program: Program, params: Params) -> Iterator[ProgramCall]:
    """Everything that requests of `program` can come to run."""
    yield from prompt_calls(program, params)
    yield from prefix_calls(program)
    yield from decode_calls(program, params)
    yield from refit_calls(program)


def prompt_calls(program: Program, params: Params) -> Iterator[ProgramCall]:
    """What prompts take: their pieces in each layer, commits, the first token.

    calls: of the longest prompt, 0 for the pieces that only others have.
    """
    spec, sizes = program.prefill_spec(), program.layout.sizes
    decoder, scalar = program.decoder, _like(jnp.int32)
    kv = placed(abstract_prefill_kv(spec))
    tokens = (params, _like(jnp.int32, spec.tokens))
    yield ProgramCall("prefill", embed_prompt, decoder, tokens)
    stream = platform.placed(jax.eval_shape(functools.partial(embed_prompt, decoder), *tokens))
    layers, chunks, last_chunks = decoder.layers(params), [], []
    longest = [(piece, 1) for piece in pieces(spec, spec.tokens)]
    for piece, calls in [*longest, *((piece, 0) for piece in last_pieces(spec))]:
        static = PrefillProgram(decoder, spec, piece.size, piece.keys)
        for weights in layers[:-1]:
            args = (weights, scalar, stream, scalar, scalar, kv)
            call = ProgramCall("prefill", prefill_chunk, static, args, donate=(2, 5), calls=calls)
            chunks.append(call)
        args = (layers[-1], scalar, stream, scalar, scalar, kv)
        call = ProgramCall("prefill", prefill_last_layer, static, args, donate=(5,), calls=calls)
        last_chunks.append(call)
    yield from _distinct(chunks)
    yield from _distinct(last_chunks)
    cache, blocks = _abstract_cache(program), _like(jnp.int32, sizes.pages)
    commits = []
    for layer, groups in enumerate(program.groups):
        observed = () if program.policy not in spec.observers else kv.observed[0]
        place = (scalar, blocks, scalar, scalar)
        prompt = Prompt(kv.k, kv.v, kv.queries, observed, *place, scalar)
        heads = platform.placed(head_arrays(program.layout, layer))
        args = (cache.layer(layer, 0), prompt, heads)
        commits.append(ProgramCall("commit", commit_layer, groups, args, donate=(0,)))
    yield from _distinct(commits)
    sampling = platform.placed(jax.eval_shape(lambda: SamplingRows.of([Sampling()])))
    first = FirstToken(decoder, program.sampling, program.alternatives)
    args = (params, _like(stream.dtype, 1, stream.shape[1]), sampling, _like(jnp.uint32, 1))
    yield ProgramCall("first token", first_token, first, args)


def prefix_calls(program: Program) -> Iterator[ProgramCall]:
    """What it takes to go on from tokens that are in the cache, where they can be shared."""
    if not keeps_all_by_block(program.layout):
        return
    cache, scalar = _abstract_cache(program), _like(jnp.int32)
    kv = placed(abstract_prefill_kv(program.prefill_spec()))
    blocks, calls = _like(jnp.int32, program.layout.sizes.pages), []
    for layer, groups in enumerate(program.groups):
        heads = platform.placed(head_arrays(program.layout, layer))
        args = (cache.pool(layer), heads, blocks, scalar, kv)
        calls.append(ProgramCall("prefix", load_prefix, groups, args, donate=(4,)))
    yield from _distinct(calls)


def decode_calls(
    program: Program, params: Params, rows: int | None = None
) -> Iterator[ProgramCall]:
    """What decode steps take: the steps, and the end of a chunk for each kind of layer.

    rows: steps of so many only; None: of each of `Program.row_counts`.
    """
    cache, sizes = _abstract_cache(program), program.layout.sizes
    [bank, *_] = cache.banks
    for count in program.row_counts if rows is None else (rows,):
        batch = platform.placed(jax.eval_shape(functools.partial(empty_batch, count)))
        banks = count // sizes.bank_rows
        args = (params, *step_arrays(cache, range(banks)), _like(jnp.bool_, count), batch)
        steps = program.of_rows(count).decoding
        yield ProgramCall("decode", decode_steps, steps, args, donate=(2,))
    lengths, queries = bank.standing.lengths, _abstract_queries(program)
    flags = _like(jnp.bool_, sizes.bank_rows)
    at = (bank.standing.block_table, lengths, lengths, flags, flags)
    end = jax.eval_shape(functools.partial(chunk_end, sizes), *at)
    yield from _distinct(
        [
            ProgramCall(
                "end of a chunk",
                end_chunk_layer,
                program.groups[layer],
                (cache.layer(layer, 0), placed(BankEnd(end, queries[layer])), _like(jnp.int32)),
                donate=(0,),
            )
            for layer in program.chunk_ends
        ]
    )


def step_arrays(cache: Cache, banks: Sequence[int]) -> tuple[Held, Held, tuple[Standing, ...]]:
    """Of some banks what decode steps only read, what they write, and where the rows stand."""
    mine = [cache.banks[bank] for bank in banks]

    def held(names: str) -> Held:
        def of(layers: tuple[LayerCache, ...]) -> Groups:
            return tuple(
                tuple(only(group, getattr(group, names)) for group in layer.groups)
                for layer in layers
            )

        shared = () if cache.shared is None else of((cache.shared,))[0]
        return Held(of(cache.pools), tuple(of(bank.layers) for bank in mine), shared)

    return held("READ"), held("WRITTEN"), tuple(bank.standing for bank in mine)


def refit_calls(program: Program) -> Iterator[ProgramCall]:
    """What fitting a request's score states anew takes, where it can come to that."""
    if program.refit_rule is None:
        return
    cache = _abstract_cache(program)
    standing = cache.banks[0].standing
    row = (_like(jnp.int32), standing.block_table, standing.lengths)
    yield from _distinct(
        [
            ProgramCall("refit", refit_layer, groups, (cache.layer(layer, 0), *row), donate=(0,))
            for layer, groups in enumerate(program.groups)
        ]
    )


def _abstract_cache(program: Program) -> Cache:
    cache = abstract(program.layout, program.policy)
    return cache if program.mesh is None else placed(cache)


def _abstract_queries(program: Program) -> Queries:
    """What `decode_steps` hands to the ends of a bank's chunk, as shapes."""
    sizes, found = program.layout.sizes, []
    shape = sizes.shape
    for layer, groups in enumerate(program.groups):
        queries = []
        for group, named in zip(groups, program.layout.groups[layer], strict=True):
            window = kind(group.group).num_queries(group)
            size = (window, sizes.bank_rows, len(named.heads), shape.group_size, shape.head_dim)
            queries.append(_like(jnp.dtype(sizes.dtype), *size) if window else None)
        found.append(tuple(queries))
    return tuple(found)


def _distinct(calls: list[ProgramCall]) -> Iterator[ProgramCall]:
    """The calls without those that run the same executable as an earlier one, but counted."""
    counts: dict[Any, int] = {}
    first: dict[Any, ProgramCall] = {}
    for call in calls:
        leaves, structure = jax.tree.flatten(call.args)
        key = (call.static, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        counts[key] = counts.get(key, 0) + call.calls
        first.setdefault(key, call)
    return (dataclasses.replace(call, calls=counts[key]) for key, call in first.items())


def _like(dtype: Any, *shape: int) -> Any:
    return platform.placed(jax.ShapeDtypeStruct(shape, dtype))
