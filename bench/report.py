"""One report of all results: `python -m bench.report FOLDER`.

Reads the JSON files that benches left in a folder and writes `report.md`, `report.html` and
pictures into it: of each file what was run, on which machine, at which commit, and its tables.
Pictures need matplotlib; without it they are left out, and that is said. `--readme FILE` also puts
what the README says of them between its marks, `<!-- results -->` and `<!-- /results -->`, and
`headline` alike.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report_tables import load, readme, tables
from bench.report_text import as_html, as_markdown

NO_PICTURES = "There are no pictures: they need matplotlib, `pip install 'flexijax[plot]'`."


def sections(folder: Path, *, pictures: bool) -> list[dict[str, Any]]:
    """Of each result file: title, lines of text, tables, and the names of its pictures."""
    found = []
    for name, content in load(folder).items():
        drawn = _draw(folder, name, content) if pictures else []
        found.append(
            {
                "title": f"bench.{content['bench']}: {name}",
                "lines": about(content),
                "tables": tables(content),
                "pictures": drawn,
            }
        )
    return found


def about(content: dict[str, Any]) -> list[str]:
    """The command, the machine, the versions and the commit behind a result."""
    machine = content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    memory = machine.get("memory_bytes")
    room = "" if memory is None else f", {memory / 2**30:.0f} GiB"
    return [
        f"`{content['command']}`",
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores{room}, "
        f"{machine['system']}, Python {machine['python']}; {versions}",
        f"commit {machine.get('commit') or 'unknown'}",
    ]


def in_readme(text: str, blocks: dict[str, str]) -> str:
    """The text with each block between its marks. Raises ValueError where there are none."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"there is no place for {name}: {begin} and {end}")
        text = f"{before}{begin}\n\n{block.strip()}\n\n{end}{after}"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if not load(args.folder):
        print(f"{args.folder} holds no result of a bench", file=sys.stderr)
        return 2
    pictures = importlib.util.find_spec("matplotlib") is not None
    found = sections(args.folder, pictures=pictures)
    notes = [] if pictures else [NO_PICTURES]
    (args.folder / "report.md").write_text(as_markdown(found, notes), encoding="utf-8")
    page = as_html(found, notes, args.folder)
    (args.folder / "report.html").write_text(page, encoding="utf-8")
    if args.readme is not None:
        text = args.readme.read_text(encoding="utf-8")
        made = in_readme(text, readme(load(args.folder)))
        args.readme.write_text(made, encoding="utf-8")
    print(f"{len(found)} results in {args.folder / 'report.md'} and report.html")
    return 0


def _draw(folder: Path, name: str, content: dict[str, Any]) -> list[str]:
    from bench import report_plots

    draw = report_plots.DRAWN.get(content["bench"])
    if draw is None or not content["rows"]:
        return []
    draw(content["rows"], folder / f"{name}.png")
    return [f"{name}.png"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="of JSON files, each from a bench's --json")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="whose tables are made anew")
    return parser


if __name__ == "__main__":
    sys.exit(main())
