"""From named tensors of a file to the decoder's params: checked as a whole before any is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import numpy as np

from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder, Params

# Rows are read and converted in blocks of about this many values, so that loading
# needs little more memory than the weights.
_BLOCK = 1 << 22


# Where weights go: one sharding for all, or one for each shape; None is the default device.
Placement: TypeAlias = (
    jax.sharding.Sharding | Callable[[tuple[int, ...]], jax.sharding.Sharding] | None
)


def placed(sharding: Placement, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
    """The sharding of one weight."""
    return sharding(shape) if callable(sharding) else sharding


class LoadError(ValueError):
    """A model that could not be loaded; the message lists every problem found."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        shown = [*self.problems[:40]]
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        super().__init__(f"cannot load {source}:\n" + "\n".join(f"  - {p}" for p in shown))


T = TypeVar("T")


def tried(problems: list[str], what: str, read: Callable[[], T]) -> T | None:
    """What `read` returns; where it fails, None, and the reasons are added to problems.

    what: put before a reason that does not say it itself.
    """
    try:
        return read()
    except LoadError as error:
        problems += error.problems
    except ValueError as error:
        problems.append(f"{what}{error}")
    except Exception as error:  # a damaged file has values of every wrong kind in every place
        problems.append(f"{what}damaged: {type(error).__name__}: {error}")
    return None


class TensorSource(Protocol):
    """A file, or several, of named tensors."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, linear maps as [out, in]."""
        ...

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of one tensor, any float dtype; raises on unreadable data."""
        ...


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one source tensor goes: its rows become those from offset on of the leaf at path."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    offset: int = 0
    heads: int | None = None  # the projections whose rows come in heads: q and k


def outer_parts(config: ModelConfig) -> dict[str, Part]:
    """The tensors outside the layers, by the names that the tables of the formats use."""
    table = (config.vocab_size, config.hidden_size)
    parts = {
        "embedding": Part(("embed", "embedding"), table),
        "final_norm": Part(("norm", "scale"), (config.hidden_size,)),
    }
    if not config.tie_embeddings:
        parts["lm_head"] = Part(("lm_head", "kernel"), table)
    return parts


def layer_parts(config: ModelConfig) -> dict[str, Part]:
    """The tensors of one layer: q, k, v share one leaf, as do gate and up."""
    c = config
    d, f, h = c.hidden_size, c.intermediate_size, c.head_dim
    q_size, kv_size = c.num_heads * h, c.num_kv_heads * h

    def kernel(leaf: str, out: int, into: int, offset: int = 0, heads: int | None = None) -> Part:
        return Part((leaf, "kernel"), (out, into), offset, heads)

    parts = {
        "attention_norm": Part(("attention_norm", "scale"), (d,)),
        "q": kernel("qkv", q_size, d, 0, c.num_heads),
        "k": kernel("qkv", kv_size, d, q_size, c.num_kv_heads),
        "v": kernel("qkv", kv_size, d, q_size + kv_size),
        "out": kernel("out", d, q_size),
        "mlp_norm": Part(("mlp_norm", "scale"), (d,)),
        "gate": kernel("gate_up", f, d),
        "up": kernel("gate_up", f, d, f),
        "down": kernel("down", d, f),
    }
    if c.qkv_bias:
        parts["q_bias"] = Part(("qkv", "bias"), (q_size,), 0)
        parts["k_bias"] = Part(("qkv", "bias"), (kv_size,), q_size)
        parts["v_bias"] = Part(("qkv", "bias"), (kv_size,), q_size + kv_size)
    if c.qk_norm:
        parts["q_norm"] = Part(("q_norm", "scale"), (h,))
        parts["k_norm"] = Part(("k_norm", "scale"), (h,))
    return parts


@dataclasses.dataclass(frozen=True)
class NameTable:
    """One format's tensor names: rows of (regex, part), group 1 of the regex the layer, if any.

    ignored: regexes of tensors that carry no weights of ours. interleaved_heads: q and k rows are
    stored with the two halves of every head interleaved (GGUF's llama).
    """

    rows: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    interleaved_heads: bool = False


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
            # A tied model may still carry its head, a copy of the embedding.
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
    shapes are right.
    """
    leaves, problems = plan(config, table, source)
    if problems:
        raise LoadError(description, problems)
    abstract = Decoder(config).abstract(dtype=dtype)
    params: dict[str, Any] = {"layers": tuple({} for _ in range(config.num_layers))}
    for done, ((index, path), pieces) in enumerate(leaves.items()):
        shape_tree = abstract if index is None else abstract["layers"][index]
        target = params if index is None else params["layers"][index]
        for key in path[:-1]:
            shape_tree, target = shape_tree[key], target.setdefault(key, {})
        leaf = np.empty(shape_tree[path[-1]].shape, dtype)
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
    step = max(1, _BLOCK // int(np.prod(part.shape[1:], dtype=np.int64)))
    for start in range(0, count, step):
        stop = min(count, start + step)
        values = source.rows(name, start, stop)
        if not np.isfinite(values.astype(np.float32, copy=False)).all():
            raise ValueError("holds values that are not finite")
        leaf[channel[start:stop] + part.offset] = values.astype(leaf.dtype, copy=False)
