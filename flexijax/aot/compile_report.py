"""What a preset's programs are once compiled for a GPU: memory, copies, kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flexijax.aot import compile as aot
from flexijax.aot.compile import CompiledReport, MemoryReport
from flexijax.aot.disassembly import KernelReport
from flexijax.aot.footprint import (
    Footprint,
    abstract_params,
    abstract_workspace,
    footprint,
    nbytes,
)
from flexijax.aot.targets import Target
from flexijax.cache import cache as kv
from flexijax.config import CacheConfig
from flexijax.engine.decode import decode_chunk
from flexijax.engine.engine import free_rows
from flexijax.engine.prefill import Program, prefill_chunk
from flexijax.models.config import ModelConfig
from flexijax.pallas_kernels import platform
from flexijax.profiles.head_profile import HeadProfile

Progress: TypeAlias = Callable[[str, int, int], None]

OURS = "flexijax_"


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program. kernels: ours, every one that differs in more than its name.

    staging_copies: instructions other than kernels that touch host memory.
    pool_copies: copies of at least the smallest array of keys or values. unaliased: cache leaves
    that are not updated in place.
    """

    lower_seconds: float
    compile_seconds: float
    device: MemoryReport
    host: MemoryReport
    pool_copies: int
    pool_bytes: int
    staging_copies: int
    host_callbacks: int
    collectives: int
    unaliased: tuple[str, ...]
    kernels: tuple[KernelReport, ...]


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A model's decode and prefill chunk on one GPU, at one context, batch and policy."""

    model: str
    target: str
    profile: str | None
    cache: CacheConfig
    context: int
    batch: int
    counted: Footprint
    decode: ProgramReport
    prefill: ProgramReport


def compile_report(
    config: ModelConfig,
    *,
    name: str,
    cache: CacheConfig,
    profile: HeadProfile | None,
    context: int,
    batch: int,
    target: Target,
    progress: Progress | None = None,
) -> CompileReport:
    """Compiles the decode chunk and the prefill chunk of a model for `target` and reports on both.

    context: tokens of each of `batch` requests, new ones included. profile: for mode "flexi".
    progress: called with (stage, done, total).
    Raises ValueError for sizes that cannot be, RuntimeError without the `aot` extra.
    """
    counted, program = footprint(
        config,
        name=name,
        cache=cache,
        profile=profile,
        context=context,
        batch=batch,
        target=target,
    )
    aot.prepare()
    params = abstract_params(config)
    return CompileReport(
        model=name,
        target=target.name,
        profile=describe(profile) if profile is not None and cache.mode == "flexi" else None,
        cache=cache,
        context=context,
        batch=batch,
        counted=counted,
        decode=_decode(program, params, target, progress),
        prefill=_prefill(program, params, target, progress),
    )


def describe(profile: HeadProfile) -> str:
    """A head profile in one line."""
    return f"{profile.model}, {profile.budget_pages} pages ({profile.source})"


def _decode(
    program: Program, params: Any, target: Target, progress: Progress | None
) -> ProgramReport:
    cache = kv.abstract(program.layout, program.policy.score)
    rows = platform.placed(jax.eval_shape(functools.partial(free_rows, program.layout.rows)))
    device = platform.sharding()
    compiled = aot.compile_for(
        functools.partial(decode_chunk, program),
        (params, cache, rows),
        target=target,
        donate_argnums=(1,),
        kernels_named=OURS,
        progress=_named(progress, "decode chunk"),
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, cache), device, device),
    )
    pools = [
        getattr(layer, name)
        for layer in (*cache.layers, *cache.host)
        for name in ("pages_k", "slots_k", "k")
        if getattr(layer, name, None) is not None
    ]
    return _program_report(compiled, params, cache, min(map(nbytes, pools)))


def _prefill(
    program: Program, params: Any, target: Target, progress: Progress | None
) -> ProgramReport:
    workspace = abstract_workspace(program)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, program.chunk), jnp.int32)

    def chunk(params, workspace, tokens, start, last):
        return prefill_chunk(program, params, tokens, start, last, workspace)

    compiled = aot.compile_for(
        chunk,
        (params, workspace, tokens, scalar, scalar),
        target=target,
        donate_argnums=(1,),
        kernels_named=OURS,
        progress=_named(progress, "prefill chunk"),
    )
    return _program_report(compiled, params, workspace, nbytes(workspace.k[0]))


def _program_report(
    compiled: CompiledReport, params: Any, donated: Any, pool_bytes: int
) -> ProgramReport:
    """donated: the argument that stands behind the params, to be updated in place."""
    first = len(jax.tree.leaves(params))
    leaves = jax.tree_util.tree_leaves_with_path(donated)
    missing = [
        jax.tree_util.keystr(path)
        for at, (path, _) in enumerate(leaves, start=first)
        if at not in compiled.aliased_arguments
    ]
    return ProgramReport(
        lower_seconds=compiled.lower_seconds,
        compile_seconds=compiled.compile_seconds,
        device=compiled.device,
        host=compiled.host,
        pool_copies=compiled.copies(at_least=pool_bytes),
        pool_bytes=pool_bytes,
        staging_copies=compiled.staging_copies,
        host_callbacks=compiled.host_callbacks,
        collectives=compiled.collectives,
        unaliased=tuple(missing),
        kernels=compiled.kernels,
    )


def _named(progress: Progress | None, program: str) -> Progress | None:
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{stage} the {program}", done, total)
