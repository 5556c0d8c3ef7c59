"""Reads models from Hugging Face directories: config.json and safetensors, sharded or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from flexijax.models.tokenizer import read_json
from flexijax.models.weights import LoadError, NameTable

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


class Safetensors:
    """The safetensors files of a directory as one `TensorSource`, memory-mapped.

    The header is read here rather than by the safetensors package, whose NumPy side neither maps
    bfloat16 nor says which tensors a truncated file has lost. LoadError lists every unreadable
    file and tensor.
    """

    def __init__(self, directory: Path) -> None:
        problems: list[str] = []
        self.shapes: Mapping[str, tuple[int, ...]]
        shapes: dict[str, tuple[int, ...]] = {}
        self._arrays: dict[str, np.ndarray] = {}
        for path in _files(directory, problems):
            try:
                found = _open(path, problems)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                cause = f"{type(error).__name__}: {error}"
                problems.append(f"{path.name}: truncated or not a safetensors file ({cause})")
                continue
            for name, array in found.items():
                if name in self._arrays:
                    problems.append(f"{path.name}: {name} is in another file too")
                self._arrays[name] = array
                shapes[name] = array.shape
        self.shapes = shapes
        if problems:
            raise LoadError(str(directory), problems)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor as stored, straight from the file."""
        return self._arrays[name][start:stop]


def _files(directory: Path, problems: list[str]) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.exists():
        try:
            weight_map = read_json(index)["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{index.name}: not a safetensors index: {error}")
            return []
        absent = [name for name in names if not (directory / name).exists()]
        problems += [f"{name}: named in {index.name}, but not there" for name in absent]
        return [directory / name for name in names if name not in absent]
    if single.exists():
        return [single]
    problems.append(
        "no model.safetensors and no model.safetensors.index.json (weights in .bin or .pth files "
        "must be converted to safetensors first)"
    )
    return []


def _open(path: Path, problems: list[str]) -> dict[str, np.ndarray]:
    """Maps one file: 8 bytes of header length, a JSON header, then the tensors' bytes."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int.from_bytes(bytes(data[:8]), "little")
    if length > len(data) - 8:
        raise ValueError(f"header of {length} bytes in a file of {len(data)}")
    header = json.loads(bytes(data[8 : 8 + length]))
    body = data[8 + length :]
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            problems.append(f"{name}: dtype {entry['dtype']} (only {', '.join(_DTYPES)})")
            continue
        if stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
            problems.append(f"{name}: {stop - start} bytes for shape {shape} {entry['dtype']}")
        elif stop > len(body):
            problems.append(f"{name}: {path.name} ends {stop - len(body)} bytes too early")
        else:
            arrays[name] = body[start:stop].view(dtype).reshape(shape)
    return arrays
