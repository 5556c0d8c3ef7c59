"""What `flexijax compile-report` prints and writes: tables, and the report as plain values."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from flexijax.aot.compile_report import OURS, CompileReport, ProgramReport
from flexijax.aot.disassembly import KernelReport
from flexijax.aot.sweep import Point
from flexijax.cli.cost_text import (
    capacity_table,
    estimate_tables,
    launches_table,
    milliseconds,
)
from flexijax.cli.terminal import megabytes, table


def as_json(report: CompileReport) -> dict[str, Any]:
    """The report as plain values, sums and shares included."""
    found = dataclasses.asdict(report)
    for name in ("step", "full_step"):
        read = getattr(report.counted, name).attention
        found["counted"][name]["attention"].update(
            total=read.total, scoring_share=read.scoring_share
        )
    found["step"]["seconds"] = report.step.seconds
    for one, entry in zip(report.capacities, found["capacities"], strict=True):
        entry["roofline_tokens_per_second"] = one.roofline_tokens_per_second
        entry["estimated_tokens_per_second"] = one.estimated_tokens_per_second
    for name, program in report.stages.items():
        of_stage = found["stages"][name]
        for tier in ("device", "host"):
            of_stage[tier]["peak"] = getattr(program, tier).peak
        if program.estimate is not None:
            of_stage["estimate"]["seconds"] = program.estimate.seconds
        counts = program.launches
        of_stage["launches"].update(
            step=dataclasses.asdict(counts.step), total=dataclasses.asdict(counts.total)
        )
        for kernel, entry in zip(program.kernels, of_stage["kernels"], strict=True):
            seen = bool(kernel.instructions)
            entry["tensor_core_instructions"] = kernel.tensor_core_instructions if seen else None
            entry["wide_loads"] = kernel.wide_loads if seen else None
    return found


def sweep_table(points: Sequence[Point], policy: str) -> str:
    """One line a context."""
    header = [
        "context",
        "KV on the device / full",
        "with summaries",
        "on the device",
        "on the host",
        "attention reads / full",
        "of it scoring",
        f"{policy}, a step",
        "full, a step",
    ]
    rows = [
        [
            f"{point.context:,}",
            f"{point.fraction:.4f}",
            f"{point.with_summaries:.4f}",
            megabytes(point.device_bytes),
            megabytes(point.host_bytes),
            f"{point.attention_ratio:.4f}",
            f"{point.scoring_share:.0%}",
            milliseconds(point.seconds),
            milliseconds(point.full_seconds),
        ]
        for point in points
    ]
    return table([header, *rows])


def text(report: CompileReport) -> str:
    """The report as tables."""
    counted = report.counted
    sizes, step, full = counted.sizes, counted.step, counted.full_step
    read, read_full = step.attention, full.attention
    parts = [
        f"{report.model}, {report.cache.find_policy()}, {report.batch} requests of "
        f"{report.context} tokens, for {report.target}",
        f"head profile: {report.profile}" if report.profile else "",
        table(
            [
                ["memory, counted from the layout", ""],
                ["weights", megabytes(sizes.weights)],
                ["KV pages", megabytes(sizes.kv_pages)],
                ["slots", megabytes(sizes.slots)],
                ["summaries", megabytes(sizes.summaries)],
                ["tables", megabytes(sizes.tables)],
                ["a prompt while it is read", megabytes(sizes.prefill)],
                ["KV pages on the host", megabytes(sizes.host_pages)],
                ["KV on the device / full KV", f"{counted.device_kv_fraction:.4f}"],
                ["with summaries", f"{counted.device_kv_fraction_with_summaries:.4f}"],
            ]
        ),
        table(
            [
                ["a decode step, counted", report.cache.find_policy().name, "full", "ratio"],
                _row("attention reads: pages", read.pages, read_full.pages),
                _row("slots", read.slots, read_full.slots),
                _row("scoring", read.scoring, read_full.scoring),
                _row("attention in all", read.total, read_full.total),
                _row("weights", step.weight_bytes, full.weight_bytes),
                [
                    "of attention's: scoring",
                    f"{read.scoring_share:.1%}",
                    f"{read_full.scoring_share:.1%}",
                    "",
                ],
                [
                    "flops",
                    f"{step.flops / 1e9:,.1f} G",
                    f"{full.flops / 1e9:,.1f} G",
                    f"{step.flops / full.flops:.4f}",
                ],
                [
                    "time by the roofline",
                    milliseconds(step.seconds),
                    milliseconds(full.seconds),
                    f"{step.seconds / full.seconds:.4f}",
                ],
                _row("apart: stored on the host", step.stored_bytes, full.stored_bytes),
                [
                    "per page a head loads at a rerank",
                    milliseconds(step.page_seconds),
                    milliseconds(full.page_seconds),
                    "",
                ],
            ]
        ),
        _programs(report.stages),
        launches_table(report.stages),
        estimate_tables(report),
        capacity_table(report.capacities),
        _kernels(report.stages),
    ]
    return "\n\n".join(part for part in parts if part)


def _row(name: str, ours: int, full: int) -> list[str]:
    return [name, megabytes(ours), megabytes(full), f"{ours / full:.4f}" if full else ""]


def _programs(programs: dict[str, ProgramReport]) -> str:
    columns = programs.values()
    return table(
        [
            ["compiled", *programs],
            ["programs", *(str(p.programs) for p in columns)],
            ["calls a prompt or chunk", *(str(p.calls) for p in columns)],
            ["device arguments", *(megabytes(p.device.arguments) for p in columns)],
            ["device temporaries", *(megabytes(p.device.temporaries) for p in columns)],
            ["device peak", *(megabytes(p.device.peak) for p in columns)],
            ["host arguments", *(megabytes(p.host.arguments) for p in columns)],
            ["host temporaries", *(megabytes(p.host.temporaries) for p in columns)],
            ["pool copies", *(str(p.pool_copies) for p in columns)],
            ["staging copies", *(str(p.staging_copies) for p in columns)],
            ["host callbacks", *(str(p.host_callbacks) for p in columns)],
            ["collectives", *(str(p.collectives) for p in columns)],
            ["cache leaves not in place", *(str(len(p.unaliased)) for p in columns)],
            ["lowered in", *(f"{p.lower_seconds:.1f} s" for p in columns)],
            ["compiled in", *(f"{p.compile_seconds:.1f} s" for p in columns)],
        ]
    )


def _kernels(programs: dict[str, ProgramReport]) -> str:
    """The worst figure of all kernels of a name; those of layers with other head counts differ."""
    header = [
        "kernel",
        "variants",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "tensor core",
        "128-bit loads",
    ]
    rows = []
    for stage, program in programs.items():
        named: dict[str, list[KernelReport]] = {}
        for kernel in program.kernels:
            stem = kernel.stem.removeprefix(OURS)
            named.setdefault(stem, []).append(kernel)
        for stem, kernels in sorted(named.items()):
            looked_at = all(kernel.instructions for kernel in kernels)
            rows.append(
                [
                    f"{stage} {stem}",
                    str(len(kernels)),
                    str(max(kernel.registers for kernel in kernels)),
                    str(max(kernel.spill_bytes for kernel in kernels)),
                    str(max(kernel.shared_bytes for kernel in kernels)),
                    f"{min(kernel.occupancy for kernel in kernels):.2f}",
                    str(min(k.tensor_core_instructions for k in kernels)) if looked_at else "?",
                    str(min(kernel.wide_loads for kernel in kernels)) if looked_at else "?",
                ]
            )
    return table([header, *rows]) if rows else ""
