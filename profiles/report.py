"""One page that binds the numbers and the pictures of a measured profile."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.plots import Picture

# Cross-dataset overlap of the unstable heads of Llama-3.1-8B-Instruct, from the FlexiCache talk.
TALK_TASKS = ("Open Review", "Big-Patent", "Multi-News", "QM-Sum", "Gov-Report")
TALK_OVERLAP = (
    (1.0, 0.81, 0.78, 0.89, 0.92),
    (0.81, 1.0, 0.72, 0.86, 0.83),
    (0.78, 0.72, 1.0, 0.80, 0.80),
    (0.89, 0.86, 0.80, 1.0, 0.92),
    (0.92, 0.83, 0.80, 0.92, 1.0),
)

_EXPLAINED = (
    "A head chooses at every step the pages of the context that it attends to. Its "
    "random-corrected overlap (RCO) between two steps is the share of pages chosen at both, scaled "
    "to 0 where it is what two choices at random would share and to 1 where the choices are the "
    "same. Heads of low RCO are *unstable*: they keep all pages on the device and choose anew at "
    "every step. The others are *stable*: they keep only their chosen pages there and choose again "
    "once in many steps."
)


def write_report(profile: HeadProfile, pictures: Sequence[Picture], folder: Path) -> Path:
    """Writes report.md into the folder that holds the pictures and returns its path."""
    measured = profile.measured
    parts = [
        f"# Head stability of {profile.model}",
        f"{len(profile.unstable)} of {profile.num_layers * profile.num_kv_heads} KV heads are "
        f"unstable at a budget of {profile.budget_pages} pages of {profile.page_size} tokens "
        f"(configuration {profile.fingerprint}).",
        _EXPLAINED,
        "## How it was measured",
        _settings(measured),
        "## Agreement",
        agreement(profile),
        "## The unstable heads",
        ", ".join(f"{layer}.{head}" for layer, head in profile.unstable) + " (layer.head)",
    ]
    for picture in pictures:
        parts += [f"## {picture.title}", picture.caption, f"![{picture.title}]({picture.stem}.svg)"]
    path = folder / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def agreement(profile: HeadProfile) -> str:
    """Overlap of the tasks and recall of split halves, beside the talk's table, as Markdown."""
    measured, parts = profile.measured, []
    overlap = measured.get("cross_task_overlap")
    if isinstance(overlap, Mapping) and len(overlap) > 1:
        names = list(overlap)
        rows = [[overlap[a][b] for b in names] for a in names]
        parts += [
            f"Unstable heads that two tasks have in common, {profile.model}: mean "
            f"{_shown(measured.get('mean_cross_task_overlap'))}, least "
            f"{_shown(measured.get('least_cross_task_overlap'))}.",
            _matrix(names, rows),
        ]
    parts += [
        f"Split-half recall: {_shown(measured.get('split_half_recall'))}, the share of the list "
        "from one half of the documents that the other half finds too.",
        "The same for Llama-3.1-8B-Instruct, from the FlexiCache talk:",
        _matrix(TALK_TASKS, TALK_OVERLAP),
    ]
    return "\n\n".join(parts)


def _settings(measured: Mapping[str, object]) -> str:
    names = {
        "documents": "documents of each task",
        "max_tokens": "longest prompt, tokens",
        "steps": "decode steps a document",
        "window": "steps a window",
        "score": "page score",
        "unstable_by": "called unstable by",
        "fraction": "share called unstable",
        "undefined_pairs": "pairs of steps without a choice, left out",
        "mean_attention_mass": "attention held by the chosen pages, mean",
    }
    rows = [f"| {text} | {_shown(measured.get(name))} |" for name, text in names.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _matrix(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for at, (name, row) in enumerate(zip(names, rows, strict=True)):
        cells = ("-" if place == at else f"{value:.2f}" for place, value in enumerate(row))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(item)}" for name, item in value.items())
    return "not measured" if value is None else str(value)
