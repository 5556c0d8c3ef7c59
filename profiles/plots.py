"""Pictures of a measured profile, each as PNG and SVG, readable without the paper at hand."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexijax.profiles import stability
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.measure import Averages

_UNSTABLE, _STABLE = "#c4452f", "#2f6fc4"


def draw_all(
    profile: HeadProfile, found: Averages, folder: Path, *, page_bytes: int
) -> list[tuple[str, str]]:
    """Draws every picture into a folder, which is made, and returns (file stem, caption) of each.

    page_bytes: bytes of the keys and values of one page of one head. Raises ValueError that says
    what to install when matplotlib is missing.
    """
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, str, Callable[[Any], None], tuple[float, float]]] = [
        (
            "rco_heat_map",
            "Mean RCO of every KV head: 1 means that a head keeps choosing the same pages, 0 that "
            "it chooses as if at random. Crosses mark the heads called unstable.",
            lambda axes: _heat_map(axes, profile),
            (2.2 + 0.55 * profile.num_kv_heads, 2 + 0.2 * profile.num_layers),
        ),
        (
            "rco_against_offset",
            "How the choice drifts: RCO between the first step of a window and the steps after it, "
            "in the layer whose heads differ most.",
            lambda axes: _against_offset(axes, profile, found),
            (6.0, 4.0),
        ),
        (
            "ranked_heads",
            "All KV heads by mean RCO. The list is a consensus of ranks over tasks, so its cut "
            "need not be sharp here.",
            lambda axes: _ranked(axes, profile),
            (7.0, 4.0),
        ),
        (
            "reload_against_interval",
            "Bytes that the stable heads load from the host per generated token, predicted from "
            "RCO at the lag that equals the rerank interval.",
            lambda axes: _reload(axes, profile, found, page_bytes),
            (6.0, 4.0),
        ),
        (
            "attention_mass",
            f"Share of the attention that the chosen {profile.budget_pages} pages hold.",
            lambda axes: _mass(axes, profile, found),
            (7.0, 4.0),
        ),
    ]
    overlap = profile.measured.get("cross_task_overlap")
    if isinstance(overlap, Mapping) and len(overlap) > 1:
        pictures.append(
            (
                "task_overlap",
                "Share of the unstable heads that two tasks agree on, each measured on its own.",
                lambda axes: _overlap(axes, overlap),
                (2.5 + 0.7 * len(overlap), 2 + 0.6 * len(overlap)),
            )
        )
    for stem, _, draw, size in pictures:
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes)
        for ending in ("png", "svg"):
            figure.savefig(folder / f"{stem}.{ending}", dpi=150)
        plt.close(figure)
    return [(stem, caption) for stem, caption, _, _ in pictures]


def reload_bytes(profile: HeadProfile, found: Averages, *, interval: int, page_bytes: int) -> float:
    """Bytes that all stable heads together load at one rerank every `interval` steps."""
    loads = stability.predicted_loads(
        found.lags[interval],
        lag=interval,
        budget=profile.budget_pages,
        pages=found.pages,
        page_size=profile.page_size,
    )
    return float(loads[~_unstable_mask(profile)].sum()) * page_bytes


def _heat_map(axes: Any, profile: HeadProfile) -> None:
    image = axes.imshow(_rco(profile), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, label="mean RCO")
    for layer, head in profile.unstable:
        axes.text(head, layer, "×", color="white", ha="center", va="center", fontsize=9)
    axes.set(xlabel="KV head", ylabel="layer", xticks=range(profile.num_kv_heads))
    axes.set_title(f"{_short(profile)}\nstability of chosen pages", fontsize=9)


def _against_offset(axes: Any, profile: HeadProfile, found: Averages) -> None:
    layer = int(np.argmax(np.ptp(_rco(profile), axis=1)))
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
    axes.set(xlabel="steps after the window's first", ylabel="mean RCO", ylim=(0, 1))
    axes.set_title(f"{_short(profile)}, layer {layer}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)


def _ranked(axes: Any, profile: HeadProfile) -> None:
    rco = _rco(profile).reshape(-1)
    order = np.argsort(rco)
    mask = _unstable_mask(profile).reshape(-1)[order]
    place = np.arange(len(order))
    axes.bar(place[mask], rco[order][mask], color=_UNSTABLE, label="unstable: pages stay on device")
    axes.bar(place[~mask], rco[order][~mask], color=_STABLE, label="stable: pages live on host")
    axes.axvline(mask.sum() - 0.5, color="black", linestyle=":", label=f"{mask.sum()} heads")
    axes.set(xlabel="KV heads, least stable first", ylabel="mean RCO", ylim=(0, 1))
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
    axes.set(xlabel="rerank interval (steps)", ylabel="MB loaded per token", ylim=(0, None))
    axes.grid(alpha=0.3)


def _mass(axes: Any, profile: HeadProfile, found: Averages) -> None:
    mass = found.mass.reshape(-1)
    mask = _unstable_mask(profile).reshape(-1)
    order = np.argsort(mass)
    colours = np.where(mask[order], _UNSTABLE, _STABLE)
    axes.scatter(np.arange(len(order)), mass[order], c=colours, s=14)
    axes.axhline(mass.mean(), color="black", linestyle=":")
    axes.annotate(f"mean {mass.mean():.2f}", (0, mass.mean() + 0.01))
    axes.set(xlabel="KV heads by mass (red: unstable)", ylabel="attention mass held", ylim=(0, 1))
    axes.grid(alpha=0.3)


def _overlap(axes: Any, overlap: Mapping[str, Mapping[str, float]]) -> None:
    names = list(overlap)
    values = np.array([[overlap[a][b] for b in names] for a in names])
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for row, column in np.ndindex(*values.shape):
        if row != column:
            shade = "white" if values[row, column] > 0.6 else "black"
            text = f"{values[row, column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=shade)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)


def _rco(profile: HeadProfile) -> np.ndarray:
    if profile.rco is None:
        raise ValueError(f"the profile of {profile.model} holds no RCO to draw")
    return np.array(profile.rco, np.float64)


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
