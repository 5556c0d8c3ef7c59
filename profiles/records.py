"""What a long run has finished, in a file of JSON lines, so that a second start goes on there."""

import hashlib
import json
from pathlib import Path
from typing import Any

from flexijax.profiles.regular_file import read_text

MAX_BYTES = 1 << 30  # a long run's are a hundredth of that


class Records:
    """Values by key; each is in the file as soon as it is added.

    path: of the file, made when something is added; None keeps nothing beyond this process. A line
    that an interrupt cut short is passed over; ValueError for a file that holds other things.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._values: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in read_text(path, MAX_BYTES).splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue
                except (RecursionError, ValueError):
                    record = None
                # A key that is no string is none of ours, and might not even be hashable.
                if (
                    not isinstance(record, dict)
                    or not {"key", "value"} <= record.keys()
                    or not isinstance(record["key"], str)
                ):
                    raise ValueError(f"{path} is not a file of records: name another one")
                self._values[record["key"]] = record["value"]

    def get(self, *key: Any) -> Any | None:
        """The JSON value added for a key of JSON values, None where there is none."""
        return self._values.get(_hash(key))

    def add(self, *key: Any, value: Any) -> None:
        """Keeps a JSON value for a key of JSON values."""
        self._values[_hash(key)] = value
        if self._path is not None:
            line = json.dumps({"key": _hash(key), "value": value})
            # A new line first, in case an interrupt left the last one unfinished.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")


def _hash(key: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
