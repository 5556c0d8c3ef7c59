"""Reads a file that somebody else wrote: a regular one, of bounded size."""

import os
import stat
from pathlib import Path


def read_text(path: str | Path, max_bytes: int) -> str:
    """The text of a UTF-8 file.

    ValueError for a file that is absent, unreadable, longer than max_bytes, or no regular file,
    which a FIFO or a device is not: reading those may never end.
    """
    try:
        # O_NONBLOCK, since opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError("not a regular file")
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(error.strerror or type(error).__name__) from error
    if len(data) > max_bytes:
        raise ValueError(f"longer than {max_bytes} bytes, the limit for such a file")
    return data.decode("utf-8")
