"""Reads the header of a .gguf file: metadata and where each tensor's bytes lie.

The gguf package's own reader keeps a NumPy object per string of the vocabulary, which takes 5
seconds and 300 MB on a vocabulary of 49 thousand and grows with it; this takes a tenth of a second.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import struct
from typing import Any

import gguf
import numpy as np

from flexijax.models.config import check_int
from flexijax.models.files import short
from flexijax.models.mapping import MAX_NAME

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
# Limits on what becomes Python objects, of which a value of one byte takes up to sixty: three times
# what the largest vocabulary published needs, and ten thousand layers.
_MAX_VALUES = 1 << 22
_MAX_TENSORS = 1 << 17
_MAX_DEPTH = 4  # of arrays in arrays


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """One tensor: its type, shape [out, in], and the range of the file that holds it, in bytes."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(data: np.ndarray) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Metadata and tensors of a whole file, uint8[size] (best a memory map).

    ValueError says what is wrong with the file, at which byte.
    """
    reader = _Reader(data.data)
    if reader.take(4) != b"GGUF":
        raise ValueError("does not begin with 'GGUF'")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}: must be 2 or 3")
    tensor_count, metadata_count = reader.scalar("Q"), reader.scalar("Q")
    if tensor_count > _MAX_TENSORS:
        raise ValueError(f"{tensor_count} tensors, the limit is {_MAX_TENSORS}")
    metadata = {}
    for _ in range(metadata_count):
        key = reader.string()
        if key in metadata:
            raise ValueError(f"metadata {short(key)} is there twice")
        reader.count(1)
        metadata[key] = reader.value(reader.scalar("I"))
    entries = [_tensor_info(reader) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    check_int("general.alignment", alignment)
    base = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise ValueError(f"tensor {short(name)} is there twice")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(
                f"tensor {short(name)}: rows of {shape[-1]} in blocks of {block} values"
            )
        start = base + offset
        tensors[name] = TensorEntry(
            kind=kind, shape=shape, start=start, stop=start + math.prod(shape) // block * size
        )
    spans = sorted((t.start, t.stop, name) for name, t in tensors.items() if t.stop > t.start)
    for (_, end, one), (start, _, two) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(f"the bytes of tensor {two} overlap those of {one}")
    return metadata, tensors


def _tensor_info(
    reader: _Reader,
) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
    name = reader.string()
    if len(name) > MAX_NAME:
        raise ValueError(f"a tensor's name of {len(name)} characters, the limit is {MAX_NAME}")
    rank = reader.scalar("I")
    if not 1 <= rank <= 4:
        raise ValueError(f"tensor {short(name)}: rank {rank}, must be 1 to 4")
    shape = tuple(reversed([reader.scalar("Q") for _ in range(rank)]))
    kind = gguf.GGMLQuantizationType(reader.scalar("I"))
    return name, kind, shape, reader.scalar("Q")


class _Reader:
    """A cursor over the file that refuses to run past its end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at, self.values = data, 0, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"header ends early: {size} bytes wanted at byte {self.at}")
        piece = bytes(self.data[self.at : self.at + size])
        self.at += size
        return piece

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def count(self, values: int) -> None:
        """Counts what is about to become Python objects."""
        self.values += values
        if self.values > _MAX_VALUES:
            raise ValueError(f"metadata of more than {_MAX_VALUES} values at byte {self.at}")

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            number = self.scalar(_SCALARS[kind])
            # 1e-5 stored as float32 is to read 1e-5 again, not 9.999999747378752e-06.
            return float(str(np.float32(number))) if kind == _FLOAT32 else number
        if kind != _ARRAY:
            raise ValueError(f"metadata of type {kind} at byte {self.at}: must be 0 to 12")
        if depth == _MAX_DEPTH:
            raise ValueError(f"arrays nested deeper than {_MAX_DEPTH} at byte {self.at}")
        item, count = self.scalar("I"), self.scalar("Q")
        self.count(count)
        code = _SCALARS.get(item)
        if code is None:
            return [self.value(item, depth + 1) for _ in range(count)]
        packed = self.take(count * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code}", packed))
