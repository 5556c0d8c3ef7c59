"""Pictures of a measured profile, each as PNG and SVG, readable without the paper at hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexijax.profiles import stability
from flexijax.profiles.averages import Averages
from flexijax.profiles.head_profile import HeadProfile

_UNSTABLE, _STABLE = "#c4452f", "#2f6fc4"
_RCO = "mean RCO (1: same pages, 0: at random)"


@dataclass(frozen=True)
class Picture:
    """One picture: its file without the ending, its title, and what one sees in it."""

    stem: str
    title: str
    caption: str
    draw: Callable[[Any], None]
    size: tuple[float, float]


def draw_all(
    profile: HeadProfile, found: Averages, folder: Path, *, page_bytes: int
) -> list[Picture]:
    """Draws every picture into a folder, which is made, and returns them.

    page_bytes: bytes of the keys and values of one page of one head. Raises ValueError that says
    what to install when matplotlib is missing.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    pictures = _pictures(profile, found, page_bytes)
    for picture in pictures:
        figure, axes = plt.subplots(figsize=picture.size, layout="constrained")
        picture.draw(axes)
        axes.set_title(f"{picture.title}\n{_short(profile)}", fontsize=10)
        for ending in ("png", "svg"):
            figure.savefig(folder / f"{picture.stem}.{ending}", dpi=150)
        plt.close(figure)
    return pictures


def _pictures(profile: HeadProfile, found: Averages, page_bytes: int) -> list[Picture]:
    budget = profile.budget_pages
    pictures = [
        Picture(
            "rco_heat_map",
            "Stability of every KV head (× unstable)",
            f"Random-corrected overlap (RCO) of the {budget} pages that a head chooses, between "
            "steps of one window, mean: 1 means that it keeps choosing the same pages, 0 that it "
            "chooses as if at random. Crosses mark the heads called unstable.",
            lambda axes: _heat_map(axes, profile),
            (2.8 + 0.55 * profile.num_kv_heads, 2 + 0.2 * profile.num_layers),
        ),
        Picture(
            "rco_against_offset",
            "How the choice drifts: the layer whose heads differ most",
            "RCO between the pages chosen at the first step of a window and those chosen at the "
            "steps after it, a line for each head of the layer.",
            lambda axes: _against_offset(axes, profile, found),
            (6.0, 4.0),
        ),
        Picture(
            "ranked_heads",
            "Attention that KV heads lose by an old choice",
            "Every bar is a head: the share of its attention on the pages that it would choose "
            "now, less that on its choice of 16 steps before and the pages begun since.",
            lambda axes: _ranked(axes, profile),
            (7.0, 4.0),
        ),
        Picture(
            "reload_against_interval",
            "Pages that stable heads load from the host",
            "Predicted from RCO at the lag that equals the rerank interval, for all stable heads "
            "together; a longer interval loads less for each token and chooses from older scores.",
            lambda axes: _reload(axes, profile, found, page_bytes),
            (6.0, 4.0),
        ),
        Picture(
            "attention_mass",
            f"Attention that the chosen {budget} pages hold",
            "Every point is a head: the share of its attention that falls on the pages it chooses, "
            "mean over steps. The rest is what a sparse step does not see.",
            lambda axes: _mass(axes, profile, found),
            (7.0, 4.0),
        ),
    ]
    overlap = profile.measured.get("cross_task_overlap")
    if isinstance(overlap, Mapping) and len(overlap) > 1:
        chance = len(profile.unstable) / (profile.num_layers * profile.num_kv_heads)
        pictures.append(
            Picture(
                "task_overlap",
                "Unstable heads that two tasks have in common",
                "Each task's list of unstable heads is measured on its own; the numbers are the "
                f"share of heads in both lists. Two lists at random would share {chance:.2f}.",
                lambda axes: _overlap(axes, overlap),
                (3.0 + 0.7 * len(overlap), 2 + 0.6 * len(overlap)),
            )
        )
    return pictures


def reload_bytes(profile: HeadProfile, found: Averages, *, interval: int, page_bytes: int) -> float:
    """Bytes that all stable heads together load at one rerank every `interval` steps."""
    loads = stability.predicted_loads(
        found.lags[interval],
        lag=interval,
        budget=found.budget,
        pages=found.pages,
        page_size=found.page_size,
    )
    return float(loads[~_unstable_mask(profile)].sum()) * page_bytes


def _heat_map(axes: Any, profile: HeadProfile) -> None:
    image = axes.imshow(_column(profile, "rco"), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, label=_RCO)
    for layer, head in profile.unstable:
        axes.text(head, layer, "×", color="white", ha="center", va="center", fontsize=9)
    axes.set(xlabel="KV head", ylabel="layer", xticks=range(profile.num_kv_heads))


def _against_offset(axes: Any, profile: HeadProfile, found: Averages) -> None:
    layer = int(np.argmax(np.ptp(_column(profile, "rco"), axis=1)))
    offsets = np.arange(1, len(found.curve) + 1)
    for head in range(profile.num_kv_heads):
        unstable = (layer, head) in profile.unstable
        axes.plot(
            offsets,
            found.curve[:, layer, head],
            marker="o",
            markersize=3,
            linestyle="--" if unstable else "-",
            label=f"head {head}" + (" (unstable)" if unstable else ""),
        )
    axes.set(xlabel="steps after the window's first", ylabel=_RCO, ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(title=f"layer {layer}", ncols=2, fontsize=8, title_fontsize=8)


def _ranked(axes: Any, profile: HeadProfile) -> None:
    lost = _column(profile, "lost_mass").reshape(-1)
    order = np.argsort(-lost)
    mask, lost = _unstable_mask(profile).reshape(-1)[order], lost[order]
    place = np.arange(len(order))
    axes.bar(place[mask], lost[mask], color=_UNSTABLE, label="unstable: pages stay on device")
    axes.bar(place[~mask], lost[~mask], color=_STABLE, label="stable: pages live on host")
    share = f"the cut: {mask.sum()} of {len(mask)} heads"
    axes.axvline(mask.sum() - 0.5, color="black", linestyle=":", label=share)
    axes.set(xlabel="KV heads, those that lose most first", ylabel="share of the attention lost")
    axes.legend(fontsize=8)


def _reload(axes: Any, profile: HeadProfile, found: Averages, page_bytes: int) -> None:
    lags = sorted(found.lags)
    values = [
        reload_bytes(profile, found, interval=lag, page_bytes=page_bytes) / lag / 1e6
        for lag in lags
    ]
    axes.plot(lags, values, marker="o", color=_STABLE)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lags, [str(lag) for lag in lags])
    for lag, value in zip(lags, values, strict=True):
        axes.annotate(f"{value:.2f}", (lag, value), (3, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="rerank interval (steps)", ylabel="MB loaded per token")
    axes.set_ylim(0, 1.1 * max(values) or 1)
    axes.set_xlim(right=1.2 * lags[-1])
    axes.grid(alpha=0.3)


def _mass(axes: Any, profile: HeadProfile, found: Averages) -> None:
    mass = found.mass.reshape(-1)
    mask = _unstable_mask(profile).reshape(-1)
    order = np.argsort(mass)
    place = np.arange(len(order))
    for chosen, colour, label in (
        (mask[order], _UNSTABLE, "unstable heads"),
        (~mask[order], _STABLE, "stable heads"),
    ):
        axes.scatter(place[chosen], mass[order][chosen], c=colour, s=14, label=label)
    axes.axhline(mass.mean(), color="black", linestyle=":")
    axes.annotate(f"mean {mass.mean():.2f}", (0, mass.mean() + 0.01))
    axes.set(xlabel="KV heads by what they hold", ylabel="share of the attention", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def _overlap(axes: Any, overlap: Mapping[str, Mapping[str, float]]) -> None:
    names = list(overlap)
    values = np.array([[overlap[a][b] for b in names] for a in names])
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.ndindex(*values.shape):
        if row != column:
            shade = "white" if values[row, column] > 0.6 else "black"
            text = f"{values[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=shade)
        else:
            axes.text(column, row, "-", ha="center", va="center", color="white")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)


def _column(profile: HeadProfile, name: str) -> np.ndarray:
    """float64[L, K] of "rco" or "lost_mass"."""
    if (values := getattr(profile, name)) is None:
        raise ValueError(f"the profile of {profile.model} holds no {name} to draw")
    return np.array(values, np.float64)


def _short(profile: HeadProfile) -> str:
    return profile.model.rsplit("/", 1)[-1]


def _unstable_mask(profile: HeadProfile) -> np.ndarray:
    mask = np.zeros((profile.num_layers, profile.num_kv_heads), bool)
    for layer, head in profile.unstable:
        mask[layer, head] = True
    return mask


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files alone; ValueError says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("pictures need matplotlib: pip install 'flexijax[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
