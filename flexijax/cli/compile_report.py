"""`flexijax compile-report`: compiles a preset for a GPU on any machine and says what came out."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from flexijax.aot import compile as aot
from flexijax.aot import targets
from flexijax.aot.capacity import GB
from flexijax.aot.compile_report import compile_report, describe
from flexijax.aot.footprint import assumed_profile, shipped_profile
from flexijax.aot.sweep import default_contexts, draw, sweep
from flexijax.cli.cache_options import add_cache_options, cache_config
from flexijax.cli.compile_text import as_json, sweep_table, text
from flexijax.cli.terminal import (
    Progress,
    check_writable,
    command_line,
    environment,
    write_json,
)
from flexijax.models import presets
from flexijax.profiles import lookup

NAME = "compile-report"
HELP = "compile a preset for a GPU that need not be here: memory, kernels, time per step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--model", required=True, choices=presets.NAMES)
    add("--context", type=int, default=32768, metavar="N", help="of each request (%(default)s)")
    add("--batch", type=int, default=16, metavar="B", help="(%(default)s)")
    known = sorted(targets.targets())
    add("--target", choices=known, default="h100", help="the GPU (%(default)s)")
    add("--profile", help="a shipped profile's name or a JSON file (default: the preset's own)")
    add(
        "--memory",
        type=float,
        nargs="*",
        default=[80, 94],
        metavar="GB",
        help="device memory in which requests are counted, and their tokens a second (80 94)",
    )
    add(
        "--sweep",
        type=int,
        nargs="*",
        metavar="N",
        help="counts these contexts (without N: up to the model's most) and compiles nothing",
    )
    add("--compile", action="store_true", help="with --sweep: compiles each context as well")
    add("--plot", type=Path, metavar="DIR", help="with --sweep: draws the fraction of full KV")
    add_cache_options(parser)


def run(args: argparse.Namespace) -> int:
    """Carries the command out; ValueError where the `aot` extra is missing, naming it."""
    cache = cache_config(args)
    if args.json is not None:
        check_writable(args.json)
    if args.sweep is None and (args.plot is not None or args.compile):
        raise ValueError("--plot and --compile go with --sweep only")
    if any(not 0 < gigabytes < 1e6 for gigabytes in args.memory):
        raise ValueError(f"--memory {args.memory} must be gigabytes, more than none")
    if args.sweep is None or args.compile:
        try:
            aot.prepare()
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    # Programs are lowered on the CPU; a GPU, should there be one, is left alone.
    jax.config.update("jax_platforms", "cpu")
    config = presets.config(args.model)
    policy, profile = cache.find_policy(), None
    if policy.needs_profile:
        if args.profile is not None:
            profile = lookup.load(args.profile)
        else:
            profile = shipped_profile(args.model, cache.budget_pages)
            profile = profile or assumed_profile(config, cache)
    progress = Progress(quiet=args.quiet)
    common = {
        "name": args.model,
        "cache": dataclasses.replace(cache, profile=profile),
        "batch": args.batch,
        "target": targets.target(args.target),
    }
    device_bytes = [round(gigabytes * GB) for gigabytes in args.memory]
    compile_one = functools.partial(
        compile_report, config, device_bytes=device_bytes, progress=progress, **common
    )
    if args.sweep is None:
        report = compile_one(context=args.context)
        if not args.quiet:
            print(text(report))
        if args.json is not None:
            write_json(args.json, {**_made_by(), "report": as_json(report)})
        return 0
    contexts = sorted(set(args.sweep)) or default_contexts(config.max_context)
    points = sweep(config, contexts, **common)
    coded = "".join(f", {memory} {codec.name}" for memory, codec in cache.codecs.items())
    title = f"{args.model}, {policy}, budget {cache.budget_tokens} tokens{coded}"
    pictures = draw(points, args.plot, title=title) if args.plot is not None else []
    if not args.quiet:
        print(f"{title}, {args.batch} requests, for {args.target}; counted from the layout\n")
        print(f"head profile: {describe(profile)}\n" if profile is not None else "", end="")
        print(sweep_table(points, policy.name))
        for path in pictures:
            print(path)
    reports = []
    for context in contexts if args.compile else ():
        reports.append(compile_one(context=context))
        if not args.quiet:
            print(f"\n{text(reports[-1])}")
    if args.json is not None:
        content = {**_made_by(), "counted": [dataclasses.asdict(point) for point in points]}
        write_json(args.json, {**content, "compiled": [as_json(report) for report in reports]})
    return 0


def _made_by() -> dict[str, Any]:
    """What a file of counts needs to be made again."""
    return {"command": command_line("flexijax"), "environment": environment()}
