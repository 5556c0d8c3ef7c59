"""What a preset's programs are once compiled for a GPU: memory, copies, kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import jax

from flexijax.aot import compile as aot
from flexijax.aot.capacity import DEVICE_BYTES, Capacity, Compiled, capacities
from flexijax.aot.compile import CompiledReport, MemoryReport
from flexijax.aot.disassembly import KernelReport
from flexijax.aot.estimate import Estimate, estimate
from flexijax.aot.footprint import Footprint, abstract_params, footprint
from flexijax.aot.launches import Launches
from flexijax.aot.targets import Target
from flexijax.cache.memory import nbytes
from flexijax.config import CacheConfig
from flexijax.engine.inventory import ProgramCall, all_calls
from flexijax.engine.program import Program
from flexijax.models.config import ModelConfig
from flexijax.pallas_kernels import platform
from flexijax.profiles.head_profile import HeadProfile

Progress: TypeAlias = Callable[[str, int, int], None]

OURS = "flexijax_"
# A prompt is bound by flops, which the estimate does not look at.
_ESTIMATED = ("decode", "end of a chunk", "refit")


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One stage of a run; of those with a program for each kind of layer, all of them together.

    programs: how many there are; calls: of them in a prompt, a chunk of decode steps or a refit.
    launches, estimate: of all those calls together, but for a program with loops the estimate of
    one trip: a decode step. device, host: of the largest. kernels: ours, every one that differs in
    more than its name. staging_copies: instructions other than kernels that touch
    host memory. pool_copies: copies of at least the smallest array of keys or values. unaliased:
    donated leaves that are not updated in place.
    """

    programs: int
    calls: int
    lower_seconds: float
    compile_seconds: float
    device: MemoryReport
    host: MemoryReport
    pool_copies: int
    staging_copies: int
    host_callbacks: int
    collectives: int
    unaliased: tuple[str, ...]
    launches: Launches
    estimate: Estimate | None
    kernels: tuple[KernelReport, ...]


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """Every program that a model runs on one GPU, at one context, batch and policy.

    stages: by name, in the order in which a request meets them. step: the estimate of a decode step
    with its share of what lies between two chunks. capacities: at equal device memory.
    """

    model: str
    target: str
    profile: str | None
    cache: CacheConfig
    context: int
    batch: int
    counted: Footprint
    stages: dict[str, ProgramReport]
    step: Estimate
    capacities: tuple[Capacity, ...]


def compile_report(
    config: ModelConfig,
    *,
    name: str,
    cache: CacheConfig,
    context: int,
    batch: int,
    target: Target,
    device_bytes: Sequence[int] = DEVICE_BYTES,
    progress: Progress | None = None,
) -> CompileReport:
    """Compiles what `generate` runs, by the same functions, for `target`, and reports on it.

    context: tokens of each of `batch` requests, new ones included. cache: with a `HeadProfile`
    where its policy needs one. device_bytes: compares with full attention in each of these.
    progress: called with (stage, done, total).
    Raises ValueError for sizes that cannot be, RuntimeError without the `aot` extra.
    """
    counted, program = footprint(
        config, name=name, cache=cache, context=context, batch=batch, target=target
    )
    if cache.codecs:
        raise ValueError(
            f"{next(iter(cache.codecs))}_codec has no kernels for a GPU yet: it is counted by "
            "`flexijax compile-report --sweep`, not compiled"
        )
    aot.prepare()
    profile = cache.profile if program.policy.needs_profile else None
    stages = compile_program(program, abstract_params(config), target, progress)
    step = _step(stages, program.chunk_steps)
    temporaries = max(stage.device.temporaries for stage in stages.values())
    return CompileReport(
        model=name,
        target=target.name,
        profile=describe(profile) if isinstance(profile, HeadProfile) else None,
        cache=cache,
        context=context,
        batch=batch,
        counted=counted,
        stages=stages,
        step=step,
        capacities=capacities(
            config,
            name=name,
            cache=cache,
            context=context,
            target=target,
            compiled=Compiled(counted, step, temporaries),
            device_bytes=device_bytes,
        ),
    )


def compile_program(
    program: Program, params: Any, target: Target, progress: Progress | None = None
) -> dict[str, ProgramReport]:
    """Every program of a run, compiled for `target`; params: shapes of the model's weights."""
    with platform.compiling_for("gpu"):
        calls = list(all_calls(program, params))
    smallest = min(nbytes(leaf) for leaf in _keys_and_values(calls))
    found: dict[str, list[ProgramReport]] = {}
    for call in calls:
        compiled = aot.compile_for(
            call.jitted,
            call.args,
            target=target,
            kernels_named=OURS,
            progress=_named(progress, call.stage),
        )
        report = _program_report(
            call, compiled, pool_bytes=smallest, page_size=program.layout.sizes.page_size
        )
        found.setdefault(call.stage, []).append(report)
    return {stage: _together(reports) for stage, reports in found.items()}


def _step(stages: dict[str, ProgramReport], chunk_steps: int) -> Estimate:
    """A decode step and its share of the end of a chunk, which comes every `chunk_steps`."""
    decode, end = stages["decode"], stages.get("end of a chunk")
    assert decode.estimate is not None
    if end is None or end.estimate is None:
        return decode.estimate
    return decode.estimate + end.estimate.times(1 / chunk_steps)


def describe(profile: HeadProfile) -> str:
    """A head profile in one line."""
    return f"{profile.model}, {profile.budget_pages} pages ({profile.source})"


def _keys_and_values(calls: Iterable[ProgramCall]) -> list[Any]:
    """The key arrays that the programs update in place: of each head group."""
    return [
        group.k
        for call in calls
        if call.stage == "decode"
        for donated in call.donate
        for part in (call.args[donated].pools, *call.args[donated].banks)
        for groups in part
        for group in groups
        if group.k is not None
    ]


def _program_report(
    call: ProgramCall, compiled: CompiledReport, *, pool_bytes: int, page_size: int
) -> ProgramReport:
    starts = [0]
    for argument in call.args:
        starts.append(starts[-1] + len(jax.tree.leaves(argument)))
    missing = [
        f"{call.stage}{jax.tree_util.keystr(path)}"
        for donated in call.donate
        for at, (path, _) in enumerate(
            jax.tree_util.tree_leaves_with_path(call.args[donated]), start=starts[donated]
        )
        if at not in compiled.aliased_arguments
    ]
    found = estimate(
        compiled.thunks,
        compiled.hlo,
        compiled.kernels,
        target=compiled.target,
        page_size=page_size,
    )
    return ProgramReport(
        programs=1,
        calls=call.calls,
        lower_seconds=compiled.lower_seconds,
        compile_seconds=compiled.compile_seconds,
        device=compiled.device,
        host=compiled.host,
        pool_copies=compiled.copies(at_least=pool_bytes),
        staging_copies=compiled.staging_copies,
        host_callbacks=compiled.host_callbacks,
        collectives=compiled.collectives,
        unaliased=tuple(missing),
        launches=compiled.launches.times(call.calls),
        estimate=found.times(call.calls) if call.stage in _ESTIMATED else None,
        kernels=compiled.kernels,
    )


def _together(reports: list[ProgramReport]) -> ProgramReport:
    """One report of all programs of a stage."""

    def total(name: str) -> Any:
        values = [getattr(report, name) for report in reports]
        return None if None in values else sum(values[1:], start=values[0])

    largest = max(reports, key=lambda report: report.device.peak)
    return dataclasses.replace(
        largest,
        **{
            field.name: total(field.name)
            for field in dataclasses.fields(ProgramReport)
            if field.name not in ("device", "host")
        },
    )


def _named(progress: Progress | None, program: str) -> Progress | None:
    if progress is None:
        return None
    return functools.partial(_tell, progress, program)


def _tell(progress: Progress, program: str, stage: str, done: int, total: int) -> None:
    progress(f"{stage} the program: {program}", done, total)
