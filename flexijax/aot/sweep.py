"""How much of full KV a policy keeps on the device as contexts grow: counted, drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from flexijax.aot.footprint import footprint
from flexijax.aot.targets import Target
from flexijax.config import CacheConfig
from flexijax.models.config import ModelConfig
from flexijax.profiles.plots import pyplot


@dataclasses.dataclass(frozen=True)
class Point:
    """One context length; bytes are of all requests together, seconds those of the roofline.

    fraction: keys and values on the device over those of full attention; with_summaries: and what
    is kept to score pages. attention_ratio: bytes that attention reads in a step, over full's.
    """

    context: int
    fraction: float
    with_summaries: float
    device_bytes: int
    host_bytes: int
    attention_ratio: float
    scoring_share: float
    seconds: float
    full_seconds: float


def default_contexts(max_context: int) -> list[int]:
    """Powers of two from 1,024 up to the model's own, and that one.

    max_context = 40960 -> [1024, 2048, 4096, 8192, 16384, 32768, 40960]
    """
    powers = (1 << power for power in range(10, max_context.bit_length()))
    return sorted({max_context, *(context for context in powers if context <= max_context)})


def sweep(
    config: ModelConfig,
    contexts: Sequence[int],
    *,
    name: str,
    cache: CacheConfig,
    batch: int,
    target: Target,
) -> list[Point]:
    """Counts every context; arguments as `compile_report`. Raises ValueError for a bad context."""
    points = []
    for context in contexts:
        counted, _ = footprint(
            config,
            name=name,
            cache=cache,
            context=context,
            batch=batch,
            target=target,
        )
        sizes, read = counted.sizes, counted.step.attention
        points.append(
            Point(
                context=context,
                fraction=counted.device_kv_fraction,
                with_summaries=counted.device_kv_fraction_with_summaries,
                device_bytes=sizes.kv_pages + sizes.slots + sizes.summaries,
                host_bytes=sizes.host_pages,
                attention_ratio=read.total / counted.full_step.attention.total,
                scoring_share=read.scoring_share,
                seconds=counted.step.seconds,
                full_seconds=counted.full_step.seconds,
            )
        )
    return points


def draw(points: Sequence[Point], folder: Path, *, title: str) -> list[Path]:
    """Draws the fractions against the context into a folder, which is made, as PNG and SVG.

    Raises ValueError that says what to install when matplotlib is missing.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    contexts = [point.context for point in points]
    axes.axhline(1.0, color="black", linestyle=":", label="full KV cache")
    axes.plot(
        contexts,
        [point.with_summaries for point in points],
        marker="s",
        color="#c4452f",
        label="keys, values and summaries",
    )
    axes.plot(
        contexts,
        [point.fraction for point in points],
        marker="o",
        color="#2f6fc4",
        label="keys and values",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts], rotation=30, ha="right")
    axes.set(
        xlabel="sequence length (tokens)",
        ylabel="fraction of the full KV cache on the device",
        ylim=(0, None),
    )
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    paths = [folder / f"device_kv_fraction.{ending}" for ending in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
