"""Tables of what `flexijax compile-report` counts and estimates: launches, times, capacities."""

from collections.abc import Sequence

from flexijax.aot.capacity import Capacity
from flexijax.aot.compile_report import OURS, CompileReport, ProgramReport
from flexijax.aot.launches import Counts
from flexijax.cli.terminal import megabytes, table


def launches_table(programs: dict[str, ProgramReport]) -> str:
    """Of a prompt's chunk, of all layers' commits, of a decode step, of a rerank of all layers."""
    columns: dict[str, Counts] = {}
    for name, program in programs.items():
        found = program.launches
        if name == "decode":
            columns["a decode step"] = found.step
            columns["beside R steps"] = found.once
        else:
            columns[name] = found.total
    return table(
        [
            ["launches", *columns],
            ["in graphs", *(str(c.in_graphs) for c in columns.values())],
            ["outside", *(str(c.outside) for c in columns.values())],
            ["graphs", *(str(c.graphs) for c in columns.values())],
            ["conditionals", *(str(c.conditionals) for c in columns.values())],
            ["loops", *(str(c.loops) for c in columns.values())],
            ["of unknown trips", *(str(c.unknown_loops) for c in columns.values())],
            ["waits of the host", *(str(c.host_syncs) for c in columns.values())],
        ]
    )


def estimate_tables(report: CompileReport) -> str:
    """What was assumed stands in `flexijax.aot.estimate`."""
    columns = {
        "a decode step" if name == "decode" else name: program.estimate
        for name, program in report.stages.items()
        if program.estimate is not None
    }
    with_rerank = milliseconds(report.step.seconds)
    times = [
        ["estimated, not measured", *columns],
        ["bytes or instructions", *(milliseconds(e.work) for e in columns.values())],
        ["between kernels of graphs", *(milliseconds(e.graph_nodes) for e in columns.values())],
        ["launches from the host", *(milliseconds(e.outside) for e in columns.values())],
        ["waits of the host", *(milliseconds(e.host_syncs) for e in columns.values())],
        ["in all", *(milliseconds(e.seconds) for e in columns.values())],
    ]
    kernels = [
        [
            f"{name} {kernel.name.removeprefix(OURS)}",
            f"{kernel.launches:g}",
            megabytes(round(kernel.nbytes)),
            milliseconds(kernel.byte_seconds),
            ("" if kernel.exact else "at least ") + milliseconds(kernel.issue_seconds),
        ]
        for name, found in columns.items()
        for kernel in found.kernels
    ]
    header = ["kernel at the peaks", "launches", "bytes", "by bytes", "by instructions"]
    times.append(["with its share of a rerank", with_rerank, *([""] * (len(columns) - 1))])
    return "\n\n".join([table(times), *([table([header, *kernels])] if kernels else [])])


def capacity_table(found: Sequence[Capacity]) -> str:
    """At equal device memory, as many requests as fit."""
    header = [
        "device memory",
        "policy",
        "requests",
        "pinned on the host",
        "roofline, a step",
        "tokens/s",
        "estimated, a step",
        "tokens/s",
    ]
    rows = [
        [
            f"{one.device_bytes / 1e9:g} GB",
            one.policy,
            str(one.requests),
            megabytes(one.host_bytes),
            milliseconds(one.roofline_seconds),
            f"{one.roofline_tokens_per_second:,.0f}",
            milliseconds(one.estimated_seconds),
            f"{one.estimated_tokens_per_second:,.0f}",
        ]
        for one in found
    ]
    return table([header, *rows]) if rows else ""


def milliseconds(seconds: float) -> str:
    """0.0123 -> "12.300 ms"."""
    return f"{1e3 * seconds:.3f} ms"
