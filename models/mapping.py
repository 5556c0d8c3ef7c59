"""Maps a file of weights into memory, so that only what is used of it is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flexijax.models.files import open_regular

MAX_NAME = 256  # characters of a tensor's name; real ones have a fifth of that


def map_file(path: Path) -> np.ndarray:
    """The bytes of a regular file, uint8[size], read-only.

    ValueError for a file that is empty, unreadable or not regular.
    """
    with open_regular(path) as file:
        return np.memmap(file, dtype=np.uint8, mode="r")
