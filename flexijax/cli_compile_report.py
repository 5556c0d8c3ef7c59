"""`flexijax compile-report`: compiles a preset for a GPU on any machine and says what came out."""

import argparse

import jax

from flexijax.compile_report import (
    CompileReport,
    ProgramReport,
    assumed_profile,
    compile_report,
    shipped_profile,
)
from flexijax.config import IMPLEMENTATIONS, MODES, SCORES, SUMMARY_DTYPES, TRANSFERS, CacheConfig
from flexijax.models import presets
from flexijax.pallas_kernels import aot, targets
from flexijax.profiles import lookup
from flexijax.terminal import check_writable, megabytes, table, write_json

NAME = "compile-report"
HELP = "compile a preset for a GPU that need not be here: memory, kernels, time per step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, default = parser.add_argument, CacheConfig()
    add("--model", required=True, choices=presets.NAMES)
    add("--context", type=int, default=32768, metavar="N", help="of each request (%(default)s)")
    add("--batch", type=int, default=16, metavar="B", help="(%(default)s)")
    add("--mode", choices=MODES, default=default.mode, help="(%(default)s)")
    known = sorted(targets.targets())
    add("--target", choices=known, default="h100", help="the GPU (%(default)s)")
    for option, value in (
        ("--budget-tokens", default.budget_tokens),
        ("--page-size", default.page_size),
        ("--rerank-interval", default.rerank_interval),
    ):
        add(option, type=int, default=value, metavar="N", help="(%(default)s)")
    add("--score", choices=SCORES, default=default.score, help="(%(default)s)")
    add("--summary-dtype", choices=SUMMARY_DTYPES, help="of minima and maxima")
    add("--implementation", choices=IMPLEMENTATIONS)
    add("--transfer", choices=TRANSFERS)
    add("--profile", help="a shipped profile's name or a JSON file (default: the preset's own)")


def run(args: argparse.Namespace) -> int:
    """Carries the command out; ValueError where the `aot` extra is missing, naming it."""
    cache = CacheConfig(
        mode=args.mode,
        page_size=args.page_size,
        budget_tokens=args.budget_tokens,
        rerank_interval=args.rerank_interval,
        score=args.score,
        summary_dtype=args.summary_dtype,
        implementation=args.implementation,
        transfer=args.transfer,
    )
    if args.json is not None:
        check_writable(args.json)
    try:
        aot.prepare()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    # Programs are lowered on the CPU; a GPU, should there be one, is left alone.
    jax.config.update("jax_platforms", "cpu")
    config = presets.config(args.model)
    profile = None
    if cache.mode == "flexi":
        if args.profile is not None:
            profile = lookup.load(args.profile)
        else:
            profile = shipped_profile(args.model, cache.budget_pages)
            profile = profile or assumed_profile(config, cache)
    report = compile_report(
        config,
        name=args.model,
        cache=cache,
        profile=profile,
        context=args.context,
        batch=args.batch,
        target=targets.target(args.target),
    )
    if not args.quiet:
        print(text(report))
    if args.json is not None:
        write_json(args.json, {"report": report})
    return 0


def text(report: CompileReport) -> str:
    """The report as tables."""
    sizes, step, full = report.sizes, report.step, report.full_step
    read, read_full = step.attention, full.attention
    parts = [
        f"{report.model}, {report.cache.mode}, {report.batch} requests of {report.context} tokens, "
        f"for {report.target}",
        f"head profile: {report.profile}" if report.profile else "",
        table(
            [
                ["memory", ""],
                ["weights", megabytes(sizes.weights)],
                ["KV pages", megabytes(sizes.kv_pages)],
                ["slots", megabytes(sizes.slots)],
                ["summaries", megabytes(sizes.summaries)],
                ["tables", megabytes(sizes.tables)],
                ["KV pages on the host", megabytes(sizes.host_pages)],
                ["KV on the device / full KV", f"{report.device_kv_fraction:.4f}"],
                ["with summaries", f"{report.device_kv_fraction_with_summaries:.4f}"],
            ]
        ),
        table(
            [
                ["a decode step", report.cache.mode, "full", "ratio"],
                _row("attention reads: pages", read.pages, read_full.pages),
                _row("slots", read.slots, read_full.slots),
                _row("scoring", read.scoring, read_full.scoring),
                _row("attention in all", read.total, read_full.total),
                _row("weights", step.weight_bytes, full.weight_bytes),
                [
                    "time by the roofline",
                    f"{1e3 * step.seconds:.3f} ms",
                    f"{1e3 * full.seconds:.3f} ms",
                    f"{step.seconds / full.seconds:.4f}",
                ],
            ]
        ),
        _programs({"decode chunk": report.decode, "prefill chunk": report.prefill}),
        _kernels({"decode": report.decode, "prefill": report.prefill}),
    ]
    return "\n\n".join(part for part in parts if part)


def _row(name: str, ours: int, full: int) -> list[str]:
    return [name, megabytes(ours), megabytes(full), f"{ours / full:.4f}" if full else ""]


def _programs(programs: dict[str, ProgramReport]) -> str:
    columns = programs.values()
    return table(
        [
            ["compiled", *programs],
            ["device arguments", *(megabytes(p.device.arguments) for p in columns)],
            ["device temporaries", *(megabytes(p.device.temporaries) for p in columns)],
            ["device peak", *(megabytes(p.device.peak) for p in columns)],
            ["host arguments", *(megabytes(p.host.arguments) for p in columns)],
            ["host temporaries", *(megabytes(p.host.temporaries) for p in columns)],
            ["pool copies", *(str(p.pool_copies) for p in columns)],
            ["host callbacks", *(str(p.host_callbacks) for p in columns)],
            ["collectives", *(str(p.collectives) for p in columns)],
            ["cache leaves not in place", *(str(len(p.unaliased)) for p in columns)],
            ["lowered in", *(f"{p.lower_seconds:.1f} s" for p in columns)],
            ["compiled in", *(f"{p.compile_seconds:.1f} s" for p in columns)],
        ]
    )


def _kernels(programs: dict[str, ProgramReport]) -> str:
    header = [
        "kernel",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "tensor core",
        "128-bit loads",
    ]
    rows = [
        [
            f"{stage} {kernel.name.removeprefix('flexijax_')}",
            str(kernel.registers),
            str(kernel.spill_bytes),
            str(kernel.shared_bytes),
            f"{kernel.occupancy:.2f}",
            str(kernel.tensor_core_instructions) if kernel.instructions else "?",
            str(kernel.wide_loads) if kernel.instructions else "?",
        ]
        for stage, program in programs.items()
        for kernel in program.kernels
    ]
    return table([header, *rows]) if rows else ""
