"""A decoder over several devices: each has some KV heads, their queries, and a part of the MLP.

A device's part of a layer is a layer of its own, of fewer heads and a narrower MLP, whose two last
products give parts of a sum over the devices. So a layer takes two all-reduces, and every device
holds the same hidden state. Each has the rows of the head of some tokens, whose scores all get; the
embedding, which may be the head, is on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder, DecoderLike, Params
from flexijax.pallas_kernels import placing

# Of each weight that is cut, by its leaf in a layer, the axis; all others are on every device.
_CUT = {
    ("lm_head", "kernel"): 0,
    ("qkv", "kernel"): 0,
    ("qkv", "bias"): 0,
    ("gate_up", "kernel"): 0,
    ("out", "kernel"): 1,
    ("down", "kernel"): 1,
}


def shard_decoder(decoder: DecoderLike, shards: int, axis: str) -> Decoder:
    """What each of `shards` devices computes; axis: the name of the mesh's axis.

    Raises ValueError for a decoder of one's own, and where KV heads are no multiple of the devices.
    """
    if not isinstance(decoder, Decoder):
        raise ValueError(
            f"mesh=... cuts the weights of the library's own decoder, not of {decoder!r}: leave it "
            "out"
        )
    config = decoder.config
    if config.num_kv_heads % shards:
        raise ValueError(
            f"mesh has {shards} devices, and the model's {config.num_kv_heads} KV heads are no "
            "multiple of them: every device keeps the pages of whole KV heads, and equally many; "
            f"use {_divisors(config.num_kv_heads)} devices"
        )
    local = dataclasses.replace(
        config,
        num_heads=config.num_heads // shards,
        num_kv_heads=config.num_kv_heads // shards,
        intermediate_size=-(-config.intermediate_size // shards),
    )
    return Decoder(local, axis)


def _divisors(count: int) -> str:
    found = [str(n) for n in range(1, count + 1) if count % n == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def shard_params(
    config: ModelConfig, params: Params, heads: Sequence[Sequence[Sequence[int]]]
) -> Params:
    """The weights over the devices of `placing.over`, cut as each device's decoder has them.

    config, params: of the whole model. heads: of each layer, of each device, its KV heads in order.
    An MLP or a head that does not go into equal parts is filled up with zeros, which add nothing.
    """
    layers = []
    for weights, of_layer in zip(params["layers"], heads, strict=True):
        cut = functools.partial(_shards, config, heads=of_layer)
        layers.append(jax.tree_util.tree_map_with_path(cut, weights))
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    cut = functools.partial(_equal_parts, count=len(heads[0]))
    return {**jax.tree_util.tree_map_with_path(cut, rest), "layers": tuple(layers)}


def param_axis(path: Sequence[Any]) -> int | None:
    """The axis in which a weight of a sharded decoder is cut; path: of its leaf, of jax."""
    keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    return _CUT.get(keys[-2:])


def shard_bytes(params: Params, shards: int) -> int:
    """Bytes of one device's part of a whole model's weights, but for what fills up parts."""
    return sum(
        leaf.nbytes // (1 if param_axis(path) is None else shards)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    )


def _equal_parts(path: Sequence[Any], leaf: jax.Array, count: int) -> jax.Array:
    """A weight outside of the layers over the devices."""
    axis, whole = param_axis(path), np.asarray(leaf)
    if axis == 0:
        whole = np.pad(whole, [(0, -len(whole) % count), (0, 0)])
    return placing.cut(whole, axis)


def _shards(
    config: ModelConfig, path: Sequence[Any], leaf: jax.Array, heads: Sequence[Sequence[int]]
) -> jax.Array:
    """One weight of a layer over the devices, each part in the order of its device's heads."""
    axis, whole = param_axis(path), np.asarray(leaf)
    if axis is None:
        return placing.cut(whole, None)
    group, width = config.num_heads // config.num_kv_heads, config.head_dim
    name = path[-2].key
    if name == "qkv":
        # Rows of queries, then of keys, then of values; of each device all three.
        first_k, first_v = config.num_heads, config.num_heads + config.num_kv_heads
        rows = [
            head
            for mine in heads
            for head in (
                *(kv * group + g for kv in mine for g in range(group)),
                *(first_k + kv for kv in mine),
                *(first_v + kv for kv in mine),
            )
        ]
        return placing.cut(_blocks(whole, rows, width, axis), axis)
    if name == "out":
        columns = [kv * group + g for mine in heads for kv in mine for g in range(group)]
        return placing.cut(_blocks(whole, columns, width, axis), axis)
    size, count = config.intermediate_size, len(heads)
    parts = [whole] if name == "down" else np.split(whole, [size])
    spare = -size % count
    padding = [(0, spare if at == axis else 0) for at in range(whole.ndim)]
    pieces = [np.split(np.pad(part, padding), count, axis=axis) for part in parts]
    # Of each device its part of the gate, then of the other.
    order = [piece[device] for device in range(count) for piece in pieces]
    return placing.cut(np.concatenate(order, axis=axis), axis)


def _blocks(whole: np.ndarray, order: Sequence[int], width: int, axis: int) -> np.ndarray:
    """Blocks of `width` rows (axis 0) or columns in another order."""
    index = (np.array(order)[:, None] * width + np.arange(width)).ravel()
    return np.take(whole, index, axis=axis)
