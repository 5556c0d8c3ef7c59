"""Every program of a run with the shapes it is called with: to compile it early, or elsewhere.

A report or a test that goes through this compiles what `generate` runs, by the same function.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.cache.arrays import Prompt, chunk_end
from flexijax.cache.cache import abstract, kind
from flexijax.cache.prefill_kv import empty_prefill_kv
from flexijax.cache.refit import refit_layer
from flexijax.engine.batch import BatchState, empty_batch
from flexijax.engine.decode import Queries, decode_steps, end_chunk_layer
from flexijax.engine.first_token import FirstToken, first_token
from flexijax.engine.jit_cache import jitted
from flexijax.engine.prefill import PrefillProgram, commit_layer, head_arrays, prefill_chunk
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


def prompt_calls(program: Program, params: Params) -> Iterator[ProgramCall]:
    """What a prompt takes: its chunks, a commit for each kind of layer, the first token."""
    spec, sizes = program.prefill_spec(), program.layout.sizes
    prefill = PrefillProgram(program.decoder, spec)
    scalar = _like(jnp.int32)
    kv = platform.placed(jax.eval_shape(lambda: empty_prefill_kv(spec)))
    piece = _like(jnp.int32, 1, prefill.spec.chunk)
    args = (params, piece, scalar, scalar, kv)
    yield ProgramCall("prefill", prefill_chunk, prefill, args, donate=(4,))
    cache, blocks = abstract(program.layout, program.policy), _like(jnp.int32, sizes.pages)
    commits = []
    for layer, groups in enumerate(program.groups):
        observed = () if program.policy not in spec.observers else kv.observed[layer][0]
        place = (scalar, blocks, scalar, scalar)
        prompt = Prompt(kv.k[layer], kv.v[layer], kv.queries[layer], observed, *place)
        heads = platform.placed(head_arrays(program.layout, layer))
        args = (cache.layers[layer], prompt, heads)
        commits.append(ProgramCall("commit", commit_layer, groups, args, donate=(0,)))
    yield from _distinct(commits)
    chunk = functools.partial(prefill_chunk, prefill)
    hidden = jax.eval_shape(chunk, params, piece, scalar, scalar, kv)[1]
    sampling = platform.placed(jax.eval_shape(lambda: SamplingRows.of([Sampling()])))
    first = FirstToken(program.decoder, program.sampling)
    args = (params, platform.placed(hidden), sampling, _like(jnp.uint32, 1))
    yield ProgramCall("first token", first_token, first, args)


def decode_calls(
    program: Program, params: Params, batch: BatchState | None = None
) -> Iterator[ProgramCall]:
    """What R decode steps take: the steps, and the end of a chunk for each kind of layer.

    batch: shapes or arrays; None makes shapes.
    """
    if batch is None:
        count = program.layout.sizes.batch
        batch = platform.placed(jax.eval_shape(lambda: empty_batch(count)))
    assert batch is not None
    cache = abstract(program.layout, program.policy)
    groups = tuple(layer.groups for layer in cache.layers)
    args = (params, groups, cache.block_table, cache.lengths, batch)
    yield ProgramCall("decode", decode_steps, program, args, donate=(1,))
    lengths, queries = cache.lengths, _abstract_queries(program)
    at = (cache.block_table, lengths, lengths, _like(jnp.bool_, *lengths.shape))
    end = jax.eval_shape(functools.partial(chunk_end, program.layout.sizes), *at)
    end = platform.placed(end)
    yield from _distinct(
        [
            ProgramCall(
                "end of a chunk",
                end_chunk_layer,
                program.groups[layer],
                (cache.layers[layer], end, queries[layer], _like(jnp.int32)),
                donate=(0,),
            )
            for layer in program.chunk_ends
        ]
    )


def refit_calls(program: Program) -> Iterator[ProgramCall]:
    """What fitting a request's score states anew takes, where it can come to that."""
    if program.refit_rule is None:
        return
    cache = abstract(program.layout, program.policy)
    row = (_like(jnp.int32), cache.block_table, cache.lengths)
    yield from _distinct(
        [
            ProgramCall("refit", refit_layer, groups, (cache.layers[layer], *row), donate=(0,))
            for layer, groups in enumerate(program.groups)
        ]
    )


def _abstract_queries(program: Program) -> Queries:
    """What `decode_steps` hands to the ends of a chunk, as shapes."""
    sizes, found = program.layout.sizes, []
    shape = sizes.shape
    for layer, groups in enumerate(program.groups):
        queries = []
        for group, named in zip(groups, program.layout.groups[layer], strict=True):
            window = kind(group.group).num_queries(group)
            size = (window, sizes.batch, len(named.heads), shape.group_size, shape.head_dim)
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
        counts[key] = counts.get(key, 0) + 1
        first.setdefault(key, call)
    return (dataclasses.replace(call, calls=counts[key]) for key, call in first.items())


def _like(dtype: Any, *shape: int) -> Any:
    return platform.placed(jax.ShapeDtypeStruct(shape, dtype))
