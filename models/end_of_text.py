"""Which token ids end a text, as the files of a model's folder say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from flexijax.models.files import read_json, short

_KEY = "eos_token_id"
# The first of these that names any decides, as in transformers' `generate`.
_FILES = ("generation_config.json", "config.json")


def stop_ids(directory: Path) -> frozenset[int]:
    """The ids that end a generation; empty where no file names one.

    ValueError names file and key of what is no token id, or a list of them.
    """
    for name in _FILES:
        value = read_json(directory / name).get(_KEY)
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            wrong = [i for i in ids if type(i) is not int or i < 0]
            if wrong:
                given = f"{_KEY}={short(wrong[0])}"
                raise ValueError(f"{directory / name}: {given}: must be a token id")
            return frozenset(ids)
    return frozenset()


def save_stop_ids(directory: Path, ids: Iterable[int]) -> None:
    """Writes the generation_config.json that `stop_ids` reads."""
    (directory / _FILES[0]).write_text(json.dumps({_KEY: sorted(ids)}))


def outside(ids: Iterable[int], vocab_size: int) -> list[str]:
    """A problem for each id that no token has."""
    return [
        f"{_KEY} {short(i)}: not in 0..{vocab_size - 1}" for i in sorted(ids) if i >= vocab_size
    ]
