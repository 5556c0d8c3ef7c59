"""Reads the text files of a model's folder: regular files only, of bounded size and depth.

A model folder is somebody else's: a FIFO in it would block a plain `open` for ever, and a link to
/dev/zero would fill the memory. Links to regular files are followed, since the hub's cache is made
of them.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_TEXT_BYTES = 1 << 20  # a template, a list of stop ids
MAX_JSON_BYTES = 16 << 20  # Python objects take up to thirty times the bytes of their JSON
MAX_TOKENIZER_BYTES = 128 << 20  # the largest vocabularies published make 35 million bytes
MAX_JSON_DEPTH = 64


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, unbuffered.

    ValueError, which names the file, for one that is absent, unreadable or not regular (a folder, a
    FIFO, a device, a socket); opening never blocks.
    """
    try:
        # Looked at before it is opened, since opening a device may already do something; and once
        # more afterwards, since the name may mean another file by then.
        _check_regular(path, os.stat(path))
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
        try:
            _check_regular(path, os.fstat(descriptor))
            return os.fdopen(descriptor, "rb", buffering=0)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or type(error).__name__}") from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The whole of a regular file; ValueError if it is larger than max_bytes."""
    pieces, size = [], 0
    with open_regular(path) as file:
        # Not more than one byte over the limit is ever read, whatever size the file claims.
        while piece := file.read(min(1 << 20, max_bytes + 1 - size)):
            pieces.append(piece)
            size += len(piece)
    if size > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes, the limit for such a file")
    return b"".join(pieces)


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file of at most max_bytes; ValueError names the file."""
    data = read_bytes(path, max_bytes)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(
    path: Path, max_bytes: int = MAX_JSON_BYTES, max_depth: int = MAX_JSON_DEPTH
) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file.

    ValueError, which names the file: broken JSON, something else than an object, more than
    max_bytes, lists and objects nested deeper than max_depth.
    """
    if not os.path.lexists(path):  # a link that leads nowhere is a fault, not an absence
        return {}
    text = read_text(path, max_bytes)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path}: nested deeper than {max_depth}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    if _deeper_than(value, max_depth):
        raise ValueError(f"{path}: nested deeper than {max_depth}")
    return value


def short(value: object) -> str:
    """How an error message shows a value out of a file: its repr, of at most 100 characters."""
    echo = reprlib.Repr()
    echo.maxstring = echo.maxother = echo.maxlong = 80
    try:
        text = echo.repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal text
        return f"<{type(value).__name__}>"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"{path}: {kind}, not a regular file")


def _deeper_than(value: Any, max_depth: int) -> bool:
    """Whether lists and dicts are nested deeper than max_depth, a level at a time."""
    level = [value]
    for _ in range(max_depth):
        level = [
            item
            for node in level
            for item in (node.values() if isinstance(node, dict) else node)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True
