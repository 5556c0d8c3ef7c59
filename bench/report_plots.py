"""The report's pictures, one for each bench that has one. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.accuracy import draw as draw_accuracy
from bench.memory import draw as draw_memory
from bench.simulate import draw as draw_simulate

Rows = Sequence[Mapping[str, Any]]


def draw_compare(rows: Rows, path: Path) -> None:
    """Milliseconds of a step, a bar a system, with the least and the most of its rounds."""
    places = list(dict.fromkeys((row["context"], row["batch"]) for row in rows))
    figure = Figure(figsize=(7, 0.5 + 0.32 * len(rows) + 0.6 * len(places)), layout="constrained")
    for at, place in enumerate(places):
        axes = figure.add_subplot(len(places), 1, at + 1)
        mine = [row for row in rows if (row["context"], row["batch"]) == place][::-1]
        times = [row["decode_ms"] for row in mine]
        spread = [
            [row["decode_ms"] - row["low_ms"] for row in mine],
            [row["high_ms"] - row["decode_ms"] for row in mine],
        ]
        names = [row["system"] for row in mine]
        colors = ["C1" if name in ("full", "quest", "flexi") else "C0" for name in names]
        bars = axes.barh(names, times, xerr=spread, color=colors, capsize=2)
        axes.bar_label(bars, fmt="%.0f", padding=6, fontsize=8)
        axes.margins(x=0.12)
        axes.set(xlabel="ms a step", title=f"{place[0]:,} tokens, batch {place[1]}")
        axes.title.set_fontsize(10)
    figure.savefig(path, dpi=120)


def draw_closeness(rows: Rows, path: Path) -> None:
    """Divergence from full attention against device bytes, a point a config."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        if row["kl"] > 0:
            error = [[row["kl"] - row["kl_low"]], [row["kl_high"] - row["kl"]]]
            axes.errorbar(row["device_mb"], row["kl"], yerr=error, marker="o", capsize=2)
            where = (row["device_mb"], row["kl"])
            axes.annotate(row["config"], where, (5, 4), textcoords="offset points", fontsize=8)
    axes.margins(x=0.2)
    axes.set(yscale="log", xlabel="KV bytes on the device, MB", ylabel="KL to full, nats a token")
    figure.savefig(path, dpi=120)


def draw_kernels(rows: Rows, path: Path) -> None:
    """What share of a copy's speed each kernel reaches."""
    shown = [row for row in rows if row.get("share") is not None][::-1]
    figure = Figure(figsize=(7, 1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh([row["kernel"] for row in shown], [row["share"] for row in shown])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.margins(x=0.12)
    axes.set(xlabel="bytes a second, share of a copy's")
    figure.savefig(path, dpi=120)


DRAWN: dict[str, Callable[[Rows, Path], None]] = {
    "compare": draw_compare,
    "closeness": draw_closeness,
    "kernels": draw_kernels,
    "memory": lambda rows, path: draw_memory([dict(row) for row in rows], path),
    "accuracy": draw_accuracy,
    "simulate": draw_simulate,
}
