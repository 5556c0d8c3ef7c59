"""Programs over the devices of a mesh: which axis of each array is cut, by the type that holds it.

A program is written for one device. Over a mesh each device runs it on its shards, under
`jax.shard_map`: what stands by KV head is cut in that axis, all else is on every device alike.
Nothing is exchanged but where the decoder says so, and of the cache nothing at all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from flexijax.models.shards import param_axis
from flexijax.pallas_kernels import placing

_Type = TypeVar("_Type", bound=type)

# Of each type, the axis of KV heads in the arrays of a field; other fields are not cut.
_AXES: dict[type, dict[str, int]] = {}
# All that arrays are cut in; None: not at all.
_CUTS = (None, 0, 1, 2)


def heads_in(**axes: int) -> Callable[[_Type], _Type]:
    """Decorates a dataclass or named tuple: in which axis its fields' arrays have KV heads."""

    def noted(kind: _Type) -> _Type:
        _AXES[kind] = axes
        return kind

    return noted


def axes_of(tree: Any) -> list[int | None]:
    """Of each leaf, the axis in which it is cut, or None."""
    nodes, _ = jax.tree_util.tree_flatten(tree, is_leaf=_is_known)
    return [axis for node in nodes for axis in _axes_in(node)]


def _is_known(node: Any) -> bool:
    return type(node) in _AXES or type(node) is dict


def _axes_in(node: Any) -> list[int | None]:
    if type(node) is dict:  # a model's weights
        return [param_axis(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    if (axes := _AXES.get(type(node))) is None:
        return [None]
    names = getattr(node, "_fields", None) or [of.name for of in dataclasses.fields(node)]
    return [axes.get(name) for name in names for _ in jax.tree.leaves(getattr(node, name))]


def on_shards(function: Callable[..., Any], mesh: Mesh, args: Sequence[Any]) -> Any:
    """function(*args) on each device's shards; for use inside of `jax.jit`."""
    leaves, structure = jax.tree.flatten(tuple(args))
    axes, made = axes_of(tuple(args)), []

    def body(*groups: list[jax.Array]) -> tuple[list[jax.Array], ...]:
        out = function(*structure.unflatten(_in_order(groups, axes)))
        made[:] = [jax.tree.structure(out), axes_of(out)]
        return _by_cut(jax.tree.leaves(out), made[1])

    groups = placing.on_shards(body, mesh, _CUTS, _CUTS)(*_by_cut(leaves, axes))
    return made[0].unflatten(_in_order(groups, made[1]))


def _by_cut(leaves: Sequence[Any], axes: Sequence[int | None]) -> tuple[list[Any], ...]:
    """The leaves of each of `_CUTS`."""
    of = list(zip(leaves, axes, strict=True))
    return tuple([leaf for leaf, axis in of if axis == cut] for cut in _CUTS)


def _in_order(groups: Sequence[list[Any]], axes: Sequence[int | None]) -> list[Any]:
    """The inverse of `_by_cut`."""
    left = {cut: iter(group) for cut, group in zip(_CUTS, groups, strict=True)}
    return [next(left[axis]) for axis in axes]


def made(function: Callable[..., Any], *static: Any) -> Any:
    """function(*static), which makes arrays from nothing: of each shard, over a mesh.

    static: hashable.
    """
    mesh = placing.current_mesh()
    return function(*static) if mesh is None else _maker(function, static, mesh)()


@functools.lru_cache(maxsize=16)
def _maker(function: Callable[..., Any], static: tuple[Any, ...], mesh: Mesh) -> Any:
    return jax.jit(lambda: on_shards(functools.partial(function, *static), mesh, ()))


def placed(tree: Any) -> Any:
    """Shapes of one device's arrays as `jax.ShapeDtypeStruct`s of those of all, where they lie."""
    mesh = placing.current_mesh()
    leaves, structure = jax.tree.flatten(tree)

    def whole(leaf: Any, axis: int | None) -> jax.ShapeDtypeStruct:
        kind = leaf.sharding.memory_kind if leaf.sharding is not None else "device"
        shape = list(leaf.shape)
        if mesh is None:
            axis = None
        if axis is not None and mesh is not None:
            shape[axis] *= mesh.size
        where = placing.sharding(kind, axis)
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype, sharding=where)

    return structure.unflatten(map(whole, leaves, axes_of(tree)))
