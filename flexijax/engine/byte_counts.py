"""Amounts of memory as people write them: 1073741824, "1GiB", "512 MiB", "80GB"."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}


def byte_count(name: str, value: int | str) -> int:
    """The bytes that a number or a text says: "1.5GiB" -> 1610612736, "80GB" -> 80000000000.

    Raises ValueError, with the argument's name, for anything else and for less than one byte.
    """
    count = 0
    if isinstance(value, str):
        said = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower(), re.ASCII)
        if said and said[2] in _UNITS:
            whole, _, fraction = said[1].partition(".")
            # In integers: a float would be off by some bytes beyond 2**53.
            count = int(whole + fraction) * _UNITS[said[2]] // 10 ** len(fraction)
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        count = value.__index__()
    if count < 1:
        raise ValueError(f"{name}={value!r} must be bytes: a positive integer, or such as '8GiB'")
    return count


def in_words(count: int) -> str:
    """Bytes for a message: 1610612736 -> "1.50 GiB", 300 -> "300 bytes"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.2f} {unit}"
    return f"{count} bytes"
