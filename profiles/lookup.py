"""Finding a shipped profile by name, or by the model that it should fit."""

import math
import re
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Protocol

from flexijax.profiles.checks import check_size, shown
from flexijax.profiles.head_profile import HeadProfile


class NamedModel(Protocol):
    """What a lookup needs to know of a loaded model."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


def names() -> tuple[str, ...]:
    """Names of the shipped profiles, sorted: file names in profiles/ without ".json"."""
    folder = resources.files("flexijax.profiles")
    found = (entry.name for entry in folder.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


def load(name: str | Path) -> HeadProfile:
    """A shipped profile by name, or any profile by the path of its JSON file.

    Raises ValueError when there is neither, with the shipped names that come closest.
    """
    if str(name) in names():
        return _shipped(str(name))
    try:
        found = Path(name).exists()
    except OSError:  # longer than the name of a file can be
        found = False
    if found:
        return HeadProfile.load(name)
    wanted = str(name)[:100].lower()
    near = [known for known in names() if wanted and known.startswith(wanted)][:3]
    near = near or get_close_matches(wanted, names(), cutoff=0)
    raise ValueError(
        f"profile={shown(str(name))} is neither a file nor a shipped profile, such as "
        f"{', '.join(near)}"
    )


def find(model: str | NamedModel, budget_pages: int) -> HeadProfile | None:
    """The shipped profile for a model at the nearest budget, or None where there is none.

    model: a model's hub name, with or without the owner, or a loaded model, which is looked up by
        its fingerprint first. A profile of the same name and another fingerprint is no match.
    budget_pages: pages a head will attend to; nearest by ratio, the smaller one of two equals.
    """
    check_size("budget_pages", budget_pages)
    name, fingerprint = (model, None) if isinstance(model, str) else (model.name, model.fingerprint)
    ranked = []
    for shipped in names():
        profile = _shipped(shipped)
        known = fingerprint is not None and profile.fingerprint is not None
        if known and profile.fingerprint != fingerprint:
            continue
        if known or _plain(profile.model) == _plain(name):
            ratio = abs(math.log(profile.budget_pages / budget_pages))
            ranked.append((not known, ratio, profile.budget_pages, shipped))
    return _shipped(min(ranked)[-1]) if ranked else None


@cache
def _shipped(name: str) -> HeadProfile:
    text = resources.files("flexijax.profiles").joinpath(f"{name}.json").read_text("utf-8")
    return HeadProfile.from_json(text)


def _plain(model: str) -> str:
    """ "meta-llama/Meta-Llama-3.1-8B-Instruct" -> "llama318binstruct" """
    tail = model.rstrip("/").rsplit("/", 1)[-1].lower()
    return re.sub(r"[^a-z0-9]", "", tail.removeprefix("meta-"))
