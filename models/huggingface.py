"""Reads models from Hugging Face directories: config.json and safetensors, sharded or not."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flexijax.models.errors import LoadError
from flexijax.models.files import read_json, short
from flexijax.models.mapping import MAX_NAME, map_file
from flexijax.models.parts import NameTable

TABLE = NameTable(
    rows=(
        (r"(?:model\.)?embed_tokens\.weight", "embedding"),
        (r"(?:model\.)?norm\.weight", "final_norm"),
        (r"lm_head\.weight", "lm_head"),
        (r"(?:model\.)?layers\.(\d+)\.input_layernorm\.weight", "attention_norm"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.q_proj\.weight", "q"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.k_proj\.weight", "k"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.v_proj\.weight", "v"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.q_proj\.bias", "q_bias"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.k_proj\.bias", "k_bias"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.v_proj\.bias", "v_bias"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.q_norm\.weight", "q_norm"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.k_norm\.weight", "k_norm"),
        (r"(?:model\.)?layers\.(\d+)\.self_attn\.o_proj\.weight", "out"),
        (r"(?:model\.)?layers\.(\d+)\.post_attention_layernorm\.weight", "mlp_norm"),
        (r"(?:model\.)?layers\.(\d+)\.mlp\.gate_proj\.weight", "gate"),
        (r"(?:model\.)?layers\.(\d+)\.mlp\.up_proj\.weight", "up"),
        (r"(?:model\.)?layers\.(\d+)\.mlp\.down_proj\.weight", "down"),
    ),
    # Old checkpoints carry the rotary frequencies, which the config already determines.
    ignored=(r".*\.rotary_emb\.inv_freq",),
)
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_MAX_VALUES = 1 << 21  # in a header: a hundred thousand tensors, more than any model has in a file
_MAX_FILES = 10_000


class Safetensors:
    """The safetensors files of a directory as one `TensorSource`, memory-mapped.

    The header is read here rather than by the safetensors package, whose NumPy side neither maps
    bfloat16 nor says which tensors a truncated file has lost. LoadError lists every unreadable
    file and tensor.
    """

    def __init__(self, directory: Path) -> None:
        problems: list[str] = []
        self._arrays: dict[str, np.ndarray] = {}
        for path in _files(directory, problems):
            try:
                found = _open(path, problems)
            except (OSError, ValueError) as error:
                problems.append(f"{path.name}: truncated or not a safetensors file ({error})")
                continue
            for name, array in found.items():
                if name in self._arrays:
                    problems.append(f"{path.name}: {name} is in another file too")
                self._arrays[name] = array
        self.shapes: Mapping[str, tuple[int, ...]] = {n: a.shape for n, a in self._arrays.items()}
        if problems:
            raise LoadError(str(directory), problems)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor as stored, straight from the file."""
        return self._arrays[name][start:stop]


def _files(directory: Path, problems: list[str]) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if os.path.lexists(index):
        try:
            names = _indexed_files(index)
        except ValueError as error:
            problems.append(f"{index.name}: not a safetensors index: {error}")
            return []
        absent = {name for name in names if not (directory / name).exists()}
        problems += [f"{name}: named in {index.name}, but not there" for name in sorted(absent)]
        return [directory / name for name in names if name not in absent]
    if os.path.lexists(single):
        return [single]
    problems.append(
        "no model.safetensors and no model.safetensors.index.json (weights in .bin or .pth files "
        "must be converted to safetensors first)"
    )
    return []


def _indexed_files(index: Path) -> list[str]:
    """The files that an index names, each of them in its own folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError("weight_map must be an object of file names")
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_FILES:
        raise ValueError(f"{len(names)} files, the limit is {_MAX_FILES}")
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(f"{short(name)} is not the name of a .safetensors file in this folder")
    return names


def _open(path: Path, problems: list[str]) -> dict[str, np.ndarray]:
    """Maps one file: 8 bytes of header length, a JSON header, then the tensors' bytes."""
    data = map_file(path)
    header, body = _header(data)
    arrays: dict[str, np.ndarray] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, start, stop = _entry(name, entry)
        except ValueError as error:
            problems.append(f"{short(name)}: {error}")
            continue
        if stop > len(body):
            problems.append(f"{name}: {path.name} ends {stop - len(body)} bytes too early")
            continue
        if stop > start:
            spans.append((start, stop, name))
        arrays[name] = body[start:stop].view(dtype).reshape(shape)
    spans.sort()
    for (_, end, one), (start, _, two) in itertools.pairwise(spans):
        if start < end:
            problems.append(f"{two}: its bytes overlap those of {one}")
    return arrays


def _header(data: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The JSON header of a file, and the bytes behind it."""
    size = int.from_bytes(bytes(data[:8]), "little")
    if size > len(data) - 8:
        raise ValueError(f"header of {size} bytes in a file of {len(data)}")
    if size > _MAX_HEADER:
        raise ValueError(f"header of {size} bytes, the format's limit is {_MAX_HEADER}")
    text = bytes(data[8 : 8 + size])
    # Before it becomes Python objects, of which a value of two bytes takes up to sixty.
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise ValueError(f"header of more than {_MAX_VALUES} values")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("header of lists in lists without end") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, data[8 + size :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is in the header twice")
    return found


def _entry(name: str, entry: Any) -> tuple[Any, tuple[int, ...], int, int]:
    """dtype, shape, and where a tensor begins and ends; ValueError where these contradict."""
    if len(name) > MAX_NAME:
        raise ValueError(f"a name of {len(name)} characters, the limit is {MAX_NAME}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError("must have dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"dtype {short(kind)} (only {', '.join(_DTYPES)})")
    if not _naturals(shape) or len(shape) > 8:
        raise ValueError(f"shape {short(shape)}: must be a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets {short(offsets)}: must be [begin, end]")
    dtype, (start, stop) = np.dtype(_DTYPES[kind]), offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{stop - start} bytes for shape {tuple(shape)} {kind}")
    return dtype, tuple(shape), start, stop


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )
