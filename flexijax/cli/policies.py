"""`flexijax policies`: the cache methods that there are."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys

from flexijax import policies
from flexijax.cli.terminal import write_json

NAME = "policies"
HELP = "list the cache methods: what each keeps, and its paper"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace) -> int:
    """Prints one line a method; with --json the whole of what is known of each."""
    rows = []
    for name in policies.names():
        policy = policies.find(name)
        about = inspect.getdoc(sys.modules[type(policy).__module__]) or ""
        options = [field.name for field in dataclasses.fields(policy)]  # pyright: ignore
        rows.append(
            {
                "policy": name,
                "what": about.partition("\n")[0],
                "options": options,
                "about": inspect.getdoc(type(policy)),
            }
        )
    if args.json is not None:
        write_json(args.json, {"policies": rows})
    if not args.quiet:
        width = max(len(row["policy"]) for row in rows)
        for row in rows:
            options = f" Options: {', '.join(row['options'])}." if row["options"] else ""
            print(f"{row['policy']:<{width}}  {row['what']}{options}")
    return 0
