"""What the fields of a head profile must be; every function raises ValueError naming the field."""

import math
import reprlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

MAX_SIZE = 2**31 - 1
MAX_DEPTH = 16  # of lists and objects in `measured`


def shown(value: object) -> str:
    """How an error shows a value, however long it is."""
    echo = reprlib.Repr()
    echo.maxstring = echo.maxother = 60
    try:
        return echo.repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal text
        return f"<{type(value).__name__}>"


def check_size(name: str, value: Any) -> None:
    """An integer from 1 to MAX_SIZE."""
    if not _is_int(value) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name}={shown(value)} must be a positive integer, up to {MAX_SIZE}")


def heads(name: str, value: Any, shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """(layer, KV head) pairs of a model of `shape`, sorted, each at most once."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={shown(value)} must be a list of [layer, KV head]")
    pairs = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(_is_int, pair)):
            raise ValueError(f"{name} holds {shown(pair)}, not [layer, KV head]")
        if not all(0 <= at < size for at, size in zip(pair, shape, strict=True)):
            raise ValueError(
                f"{name} holds {shown(list(pair))}, outside of {shape[0]} layers and "
                f"{shape[1]} KV heads"
            )
        pairs.append((int(pair[0]), int(pair[1])))
    if len(set(pairs)) != len(pairs):
        raise ValueError(f"{name} names a head twice")
    return tuple(sorted(pairs))


def shares(name: str, value: Any, shape: tuple[int, int]) -> tuple[tuple[float | None, ...], ...]:
    """float[L][K], each at most 1, or None."""
    layers, kv_heads = shape
    if (
        not isinstance(value, list | tuple)
        or len(value) != layers
        or not all(isinstance(row, list | tuple) and len(row) == kv_heads for row in value)
    ):
        raise ValueError(f"{name} must hold {layers} rows of {kv_heads} numbers")
    for row in value:
        for number in row:
            # A mean of shares, each of which has room above 1 for rounding.
            if number is not None and not (_is_finite(number) and number <= 1 + 1e-6):
                raise ValueError(
                    f"{name} must hold finite numbers of at most 1, and has {shown(number)}"
                )
    return tuple(tuple(row) for row in value)


def check_lags(name: str, value: Any, shape: tuple[int, int]) -> None:
    """Shares by distance in steps, at least 1, written in decimal."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={shown(value)} must be an object")
    for lag, rows in value.items():
        if not (isinstance(lag, str) and lag.isascii() and lag.isdecimal() and len(lag) < 10):
            raise ValueError(f"{name} has the key {shown(lag)}, which is no number of steps")
        if int(lag) < 1:
            raise ValueError(f"{name} has the key {lag!r}: must be at least 1")
        shares(f"{name}.{lag}", rows, shape)


def check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Plain JSON of finite numbers, of at most MAX_DEPTH lists and objects in each other."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name[:80]} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name} has the key {shown(key)}, not a string")
            check_plain(f"{name}.{key[:60]}", entry, depth + 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            check_plain(name, entry, depth + 1)
    elif not isinstance(value, str | bool | None) and not _is_finite(value):
        raise ValueError(f"{name}={shown(value)} must be a string, a finite number or null")


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
