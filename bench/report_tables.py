"""Tables of the report and of the README, from the JSON that benches leave."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.accuracy import COLUMNS as ACCURACY
from bench.accuracy import TASK_COLUMNS
from bench.compare import COLUMNS as COMPARE
from bench.kernels import COLUMNS as KERNELS
from bench.memory import COLUMNS as MEMORY
from bench.simulate import CHANGED
from bench.simulate import COLUMNS as SIMULATE

# What a table shows of a bench's rows, where it is not all of them.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "compare": COMPARE,
    "memory": MEMORY,
    "kernels": KERNELS,
    "accuracy": ACCURACY,
    "simulate": SIMULATE,
    "closeness": (
        *("config", "kl", "kl_low", "kl_high", "agreement", "device_mb", "summary_mb"),
        *("documents", "tokens"),
    ),
}
# Of the README: what a system is called, in the order of its rows.
_SYSTEMS = {
    "flexi": "`flexi`",
    "quest": "`quest`",
    "full": "`full`",
    "torch_flexi_compiled": "FlexiCache in PyTorch, `torch.compile`",
    "torch_flexi": "FlexiCache in PyTorch, eager",
    "transformers_static": "transformers, static cache",
    "transformers": "transformers, dynamic cache",
}
_CONFIGS = {
    "flexi": "`flexi`",
    "flexi:512": "`flexi`, a budget of 512 tokens",
    "flexi:minmax": "`flexi`, min/max scores of 16 bit",
    "quest": "`quest`",
}


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, column names, and rows of text."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder by file name without its ending; files of anything else left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"bench", "rows", "environment"} <= content.keys():
            found[path.stem] = content
    return found


def tables(content: Mapping[str, Any]) -> list[Table]:
    """All that a result has: its rows, and what else it found, each under a caption."""
    caption = content.get("caption", "")
    made = [_of_rows(caption, content["rows"], _COLUMNS.get(content["bench"]))]
    before = f"{caption}: " if caption else ""
    for name, caption, columns in (
        (
            "ratios",
            "How many times as good as the first, or the best setting of transformers",
            None,
        ),
        ("closeness", "Divergence of `other` from `system`, fed one answer, nats a token", None),
        ("by_task", "Scores of each task, and their ratios to full attention's", TASK_COLUMNS),
        ("sensitivity", "how many times as good, with one assumption changed", CHANGED),
    ):
        if content.get(name):
            made.append(_of_rows(before + caption, content[name], columns))
    if content.get("pages"):
        pages = content["pages"]
        right = "; ".join(pages["wrong"]) or "all the same"
        text = f"{pages['pages']} choices of pages in {pages['steps']} steps: {right}"
        made.append(Table(text, (), ()))
    if content.get("wrong"):
        made.append(Table(f"Not shown, since they were wrong: {content['wrong']}", (), ()))
    if content.get("without"):
        made.append(Table(f"Left out: {content['without']}", (), ()))
    return made


def markdown(table: Table) -> str:
    """The table, its caption above it."""
    lines = [table.caption, ""] if table.caption else []
    if table.columns:
        lines += [_line(table.columns), "|" + "---|" * len(table.columns)]
        lines += map(_line, table.rows)
    return "\n".join(lines).rstrip() + "\n"


def readme(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The blocks of the README by name: headline, the first numbers, and results, the tables."""
    by_bench: dict[str, list[Mapping[str, Any]]] = {}
    for content in found.values():
        by_bench.setdefault(content["bench"], []).append(content)
    compared, close = by_bench.get("compare", []), by_bench.get("closeness", [])
    return {
        "headline": "\n".join([*map(_near, close), *map(_fast, compared)]),
        "results": "\n".join([*map(_speed, compared), *map(_closeness, close)]),
    }


def _near(content: Mapping[str, Any]) -> str:
    row = next(row for row in content["rows"] if row["config"] == "flexi")
    return (
        f"- **{row['kl']:.3f} nats** from full attention per token at a budget of 1,024 tokens, "
        f"{100 * row['agreement']:.1f} % of the most\n  likely tokens the same "
        f"({row['documents']} documents, contexts up to {content['settings']['max_tokens']:,} "
        "tokens)."
    )


def _fast(content: Mapping[str, Any]) -> str:
    largest = max(map(_place, content["rows"]))
    rows = {row["system"]: row for row in content["rows"] if _place(row) == largest}
    ratios = {one["system"]: one for one in content["ratios"] if _place(one) == largest}
    flexi, full = (rows[name]["device_kv_bytes"] / 1e6 for name in ("flexi", "full"))
    return (
        f"- **{flexi:.0f} MB instead of {full:.0f} MB** of keys and values on the device at "
        f"{largest[0]:,} tokens.\n"
        f"- **{ratios['flexi']['decode_ms']:.1f} times as fast** per token as transformers at its "
        f"best at {largest[0]:,} tokens, batch {largest[1]},\n  on "
        f"{content['environment']['threads']} CPU cores."
    )


def _speed(content: Mapping[str, Any]) -> str:
    parts = []
    for place in sorted({_place(row) for row in content["rows"]}):
        rows = [row for row in content["rows"] if _place(row) == place]
        rows.sort(key=lambda row: [*_SYSTEMS].index(row["system"]))
        mine = (one for one in content["ratios"] if _place(one) == place)
        ratio = {one["system"]: one["decode_ms"] for one in mine}
        lines = []
        for row in rows:
            times = ratio.get(row["system"])
            lines.append(
                (
                    _SYSTEMS[row["system"]],
                    f"{_number(row['decode_ms'])} [{_number(row['low_ms'])}, "
                    f"{_number(row['high_ms'])}]",
                    "" if times is None else f"{times:.1f}",
                    _number(row["prefill_s"]),
                    _number(row["device_kv_bytes"] / 1e6),
                    _number(row["peak_bytes"] / 1e9),
                )
            )
        head = (
            f"{place[0]:,} tokens, batch {place[1]}",
            "ms a step [least, most]",
            "times as fast as transformers at its best",
            *("prefill, s", "KV on the device, MB", "peak memory, GB"),
        )
        parts.append(markdown(Table("", head, tuple(lines))))
    machine = content["environment"]
    settings, packages = content["settings"], machine["packages"]
    parts.append(
        f"{machine['cpu']}, {machine['threads']} cores, no GPU; jax {packages['jax']}, torch "
        f"{packages['torch']}, transformers {packages['transformers']}; SmolLM2-135M in float32, a "
        f"budget of {settings['budget_tokens']:,} tokens, {_rounds(content)}.\n"
    )
    return "\n".join(parts)


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["context"], row["batch"]


def _rounds(content: Mapping[str, Any]) -> str:
    rounds = min(row["rounds"] for row in content["rows"])
    return "one round" if rounds == 1 else f"medians of {rounds} rounds that took turns"


def _closeness(content: Mapping[str, Any]) -> str:
    lines = [
        (
            _CONFIGS.get(row["config"], f"`{row['config']}`"),
            f"{row['kl']:.4f} [{row['kl_low']:.4f}, {row['kl_high']:.4f}]",
            f"{100 * row['agreement']:.1f} %",
            _number(row["device_mb"]),
        )
        for row in content["rows"]
    ]
    rows = content["rows"]
    caption = (
        f"{rows[0]['documents']} documents, contexts up to {content['settings']['max_tokens']:,} "
        f"tokens, fed full attention's answers of at most {content['settings']['steps']} tokens:"
    )
    head = ("policy", "divergence, nats [95 %]", "same next token", "KV on the device, MB")
    return markdown(Table(caption, head, tuple(lines)))


def _of_rows(
    caption: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None
) -> Table:
    known = dict.fromkeys(name for row in rows for name in row)
    shown = tuple(name for name in (columns or known) if name in known)
    return Table(
        caption, shown, tuple(tuple(_number(row.get(name)) for name in shown) for row in rows)
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
