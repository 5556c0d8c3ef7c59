"""Which tensors a model has, and where each goes in the decoder's params."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from flexijax.models.config import ModelConfig


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


def leaf_shapes(
    config: ModelConfig,
) -> tuple[dict[tuple[str, ...], tuple[int, ...]], dict[tuple[str, ...], tuple[int, ...]]]:
    """The shape of every leaf outside the layers, and of every leaf of one layer, by path."""
    return _leaves(outer_parts(config)), _leaves(layer_parts(config))


def _leaves(parts: Mapping[str, Part]) -> dict[tuple[str, ...], tuple[int, ...]]:
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for part in parts.values():
        rows = shapes.get(part.path, (0,))[0] + part.shape[0]
        shapes[part.path] = (rows, *part.shape[1:])
    return shapes
