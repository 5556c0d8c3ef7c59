"""From named tensors of a file to the decoder's params: checked as a whole before any is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np

from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Params
from flexijax.models.errors import LoadError
from flexijax.models.parts import (
    NameTable,
    Part,
    TensorSource,
    layer_parts,
    leaf_shapes,
    outer_parts,
)
from flexijax.models.placement import Placement, check_memory, placed

# Rows are read and converted in blocks of about this many values, so that loading
# needs little more memory than the weights.
_BLOCK = 1 << 22
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

Plan = dict[tuple[int | None, tuple[str, ...]], list[tuple[str, Part]]]


def plan(config: ModelConfig, table: NameTable, source: TensorSource) -> tuple[Plan, list[str]]:
    """Says which source tensors fill which leaf, and lists every problem; reads no data.

    A source name must match exactly one row, every part must be filled exactly once, and every
    shape must be the config's.
    """
    if config.num_layers > len(source.shapes):
        # A damaged count may be in the billions: not worth a line for each of their tensors.
        all_of_them = f"{len(source.shapes)} tensors in all"
        return {}, [f"the config says {config.num_layers} layers, and there are {all_of_them}"]
    outer, layer = outer_parts(config), layer_parts(config)
    wanted: dict[tuple[int | None, str], Part] = {(None, k): spec for k, spec in outer.items()}
    for index in range(config.num_layers):
        wanted |= {(index, part): spec for part, spec in layer.items()}
    found: dict[tuple[int | None, str], str] = {}
    problems = []
    for name, shape in source.shapes.items():
        if any(re.fullmatch(pattern, name) for pattern in table.ignored):
            continue
        matches = [(m, part) for pattern, part in table.rows if (m := re.fullmatch(pattern, name))]
        if len(matches) != 1:
            problems.append(f"{name}: not a tensor of this model family")
            continue
        match, part = matches[0]
        key = (int(match[1]) if match.re.groups else None, part)
        spec = wanted.get(key)
        if spec is None:
            # A tied model may still carry its head: `untied` has compared it with the embedding.
            if part != "lm_head":
                problems.append(f"{name}: the config has no place for it")
        elif key in found:
            problems.append(f"{name}: the same tensor as {found[key]}")
        else:
            found[key] = name
            if tuple(shape) != spec.shape:
                problems.append(f"{name}: shape {tuple(shape)}, the config says {spec.shape}")
    for index, part in wanted:
        if (index, part) not in found:
            where = "" if index is None else f" of layer {index}"
            problems.append(f"missing tensor: {part}{where}")
    leaves: Plan = {}
    for (index, part), name in found.items():
        spec = wanted[index, part]
        leaves.setdefault((index, spec.path), []).append((name, spec))
    return leaves, problems


def untied(config: ModelConfig, table: NameTable, source: TensorSource) -> ModelConfig:
    """The config as the weights have it: with a head of its own where they hold another one.

    transformers 5 takes `tie_word_embeddings` for wrong, too, where a checkpoint holds both arrays
    and they differ (`PreTrainedModel.tie_weights`).
    """
    if not config.tie_embeddings:
        return config
    names = {
        part: name
        for name in source.shapes
        for pattern, part in table.rows
        if part in ("embedding", "lm_head") and re.fullmatch(pattern, name)
    }
    if len(names) < 2 or _equal(source, names["embedding"], names["lm_head"]):
        return config
    return dataclasses.replace(config, tie_embeddings=False)


def _equal(source: TensorSource, one: str, two: str) -> bool:
    shape = source.shapes[one]
    return shape == source.shapes[two] != () and all(
        np.array_equal(source.rows(one, *at), source.rows(two, *at)) for at in _blocks(shape)
    )


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) of the rows that are read together."""
    step = max(1, _BLOCK // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)


def assemble(
    config: ModelConfig,
    table: NameTable,
    source: TensorSource,
    *,
    dtype: Any,
    description: str,
    progress: Callable[[float], None] | None,
    sharding: Placement,
) -> Params:
    """Params of a decoder in dtype from a source of tensors, leaf by leaf.

    progress is called with the fraction done; sharding, when given, places every leaf. Raises
    LoadError that names description and lists every problem; nothing is read unless all names and
    shapes are right and there is memory for all.
    """
    leaves, problems = plan(config, table, source)
    if problems:
        raise LoadError(description, problems)
    outer, layer = leaf_shapes(config)
    shapes = {(index, path): (outer if index is None else layer)[path] for index, path in leaves}
    check_memory(shapes.values(), dtype=dtype, sharding=sharding, description=description)
    params: dict[str, Any] = {"layers": tuple({} for _ in range(config.num_layers))}
    for done, ((index, path), pieces) in enumerate(leaves.items()):
        target = params if index is None else params["layers"][index]
        for key in path[:-1]:
            target = target.setdefault(key, {})
        leaf = np.empty(shapes[index, path], dtype)
        for name, part in pieces:
            try:
                _fill(leaf, source, name, part, table.interleaved_heads)
            except (ValueError, OSError) as error:
                problems.append(f"{name}: {error}")
        if not problems:
            target[path[-1]] = jax.device_put(leaf, placed(sharding, leaf.shape))
        if progress is not None:
            progress((done + 1) / len(leaves))
    if problems:
        raise LoadError(description, problems)
    return params


def _fill(leaf: np.ndarray, source: TensorSource, name: str, part: Part, interleaved: bool) -> None:
    """Copies one source tensor into its place in leaf, block by block."""
    count = part.shape[0]
    channel = np.arange(count)
    if interleaved and part.heads is not None:
        # Row 2i + p of a head holds channel i of half p.
        half = count // part.heads // 2
        channel = channel.reshape(part.heads, 2, half).swapaxes(1, 2).reshape(count)
    for start, stop in _blocks(part.shape):
        values = source.rows(name, start, stop)
        # No checkpoint of these families has such values: they would make every logit NaN.
        if not np.isfinite(values).all():
            raise ValueError("holds values that are not finite")
        with np.errstate(over="ignore"):
            converted = values.astype(leaf.dtype, copy=False)
        if _max(values.dtype) > _max(leaf.dtype) and not np.isfinite(converted).all():
            raise ValueError(overflow(_largest(source, name), leaf.dtype))
        leaf[channel[start:stop] + part.offset] = converted


def overflow(largest: float, dtype: Any) -> str:
    """Says that a magnitude of `largest` is infinite in dtype, and which dtype would hold it."""
    with np.errstate(over="ignore"):
        wide = [n for n, kind in DTYPES.items() if np.isfinite(np.float64(largest).astype(kind))]
    name = np.dtype(dtype).name
    advice = f"load with dtype={' or '.join(map(repr, wide))}" if wide else "no dtype holds it"
    return f"its largest value, {largest:.6g}, is infinite in {name}: {advice}"


def _largest(source: TensorSource, name: str) -> float:
    blocks = (source.rows(name, *at) for at in _blocks(source.shapes[name]))
    return max(float(np.abs(values.astype(np.float64)).max()) for values in blocks)


def _max(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)
