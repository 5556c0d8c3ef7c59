"""The command line: one parser, and a module for each subcommand."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from flexijax.cli import compile_report as cli_compile_report
from flexijax.cli import generate as cli_generate
from flexijax.cli import policies as cli_policies
from flexijax.cli import profile as cli_profile
from flexijax.cli import serve as cli_serve
from flexijax.cli.terminal import mend_streams, one_line, return_freed_memory, use_compilation_cache

# A subcommand is a module with NAME, HELP, add_arguments(parser) and run(args) -> exit code.
SUBCOMMANDS = (cli_generate, cli_serve, cli_profile, cli_compile_report, cli_policies)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage, which buries what is wrong."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of every subcommand."""
    root = _Parser(prog="flexijax", description="Long-context generation in JAX.")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in SUBCOMMANDS:
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the results")
        command.add_argument("--quiet", action="store_true", help="no progress and no table")
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, or 2 after bad input and one line on stderr."""
    mend_streams()
    args = parser().parse_args(argv)
    return_freed_memory()
    use_compilation_cache()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"flexijax {args.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
