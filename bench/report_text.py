"""The report as Markdown, and as one HTML page that holds its pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report_tables import Table, markdown

_TITLE = "flexijax: what the benches found"
_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.2em .6em}"
    "td{text-align:right}td:first-child{text-align:left}img{max-width:100%}"
)


def as_markdown(sections: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """A heading for each result, below it what was run, its tables and pictures."""
    parts = [f"# {_TITLE}", *notes]
    for section in sections:
        parts += [f"## {section['title']}", *section["lines"]]
        parts += [markdown(table).rstrip() for table in section["tables"]]
        parts += [f"![{name}]({name})" for name in section["pictures"]]
    return "\n\n".join(parts) + "\n"


def as_html(sections: Sequence[dict[str, Any]], notes: Sequence[str], folder: Path) -> str:
    """The same; pictures are read from the folder."""
    parts = [f"<h1>{_TITLE}</h1>", *map(_paragraph, notes)]
    for section in sections:
        parts.append(f"<h2>{html.escape(section['title'])}</h2>")
        parts += map(_paragraph, section["lines"])
        parts += map(_table, section["tables"])
        for name in section["pictures"]:
            data = base64.b64encode((folder / name).read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    head = f'<meta charset="utf-8"><title>{_TITLE}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>\n" + "\n".join(parts) + "</body></html>"


def _table(table: Table) -> str:
    parts = [_paragraph(table.caption)] if table.caption else []
    if table.columns:
        rows = [_row("th", table.columns), *(_row("td", row) for row in table.rows)]
        parts.append(f"<table>{''.join(rows)}</table>")
    return "".join(parts)


def _row(cell: str, texts: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{cell}>{_inline(text)}</{cell}>' for text in texts)}</tr>"


def _paragraph(text: str) -> str:
    return f"<p>{_inline(text)}</p>"


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
