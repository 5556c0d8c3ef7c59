"""Where arrays lie: on the first device, or in shards over the devices of a mesh."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The mesh over whose devices arrays are placed in this context; None: the first device alone.
_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextmanager
def over(mesh: Mesh | None) -> Iterator[None]:
    """Inside a with block arrays are placed over all devices of `mesh`, which has one axis."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def current_mesh() -> Mesh | None:
    """That of `over`; None where arrays lie on one device."""
    return _mesh.get()


def sharding(memory_kind: str = "device", axis: int | None = None) -> NamedSharding:
    """Over the first device in `memory_kind` ("device", "pinned_host"), or the devices of `over`.

    There replicated, or with one axis of the array cut into a shard for each device. A
    NamedSharding, since abstract values keep their memory space only with one.
    """
    mesh = _mesh.get() or Mesh(np.array(jax.devices()[:1]), ("x",))
    return NamedSharding(mesh, _spec(mesh, axis), memory_kind=memory_kind)


def placed(tree: Any, memory_kind: str = "device") -> Any:
    """The leaves as `jax.ShapeDtypeStruct`s that lie in `memory_kind`."""
    where = sharding(memory_kind)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def put(tree: Any) -> Any:
    """The leaves on the device, placed as a program's results are, and as `placed` says.

    A program that is called with what is placed otherwise is compiled once more. Over a mesh each
    device has a copy.
    """
    mesh = _mesh.get()
    if mesh is not None and has_other_processes(mesh):
        return jax.tree.map(lambda leaf: cut(np.asarray(leaf), None), tree)
    return jax.device_put(tree, sharding())


def has_other_processes(mesh: Mesh) -> bool:
    """Whether some of its devices are another process's."""
    return len(mesh.local_devices) < mesh.size


def from_first_process(array: np.ndarray) -> np.ndarray:
    """Process 0's array, of the same shape and dtype in each; all processes must ask for it."""
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def fetched(tree: Any) -> Any:
    """The leaves as NumPy arrays, those too of which other processes hold a part.

    All processes must ask for those, and at the same time.
    """

    def fetch(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(fetch, tree))


def cut(array: np.ndarray, axis: int | None, memory_kind: str = "device") -> jax.Array:
    """An array of this machine over the devices of `over`, an equal part of `axis` on each.

    None: all of it on each. Each process has all of the array, and places what is its own.
    """
    where = sharding(memory_kind, axis)
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


def on_shards(
    function: Callable[..., Any], mesh: Mesh, in_axes: Any, out_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """`jax.shard_map`: each device runs the function on its shards.

    in_axes, out_axes: of each argument and result, a tree, the axis of its arrays that is cut; None
    for what every device has, and gives, alike.
    """
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(_spec(mesh, axis) for axis in in_axes),
        out_specs=tuple(_spec(mesh, axis) for axis in out_axes),
        check_vma=False,
    )


def _spec(mesh: Mesh, axis: int | None) -> PartitionSpec:
    if axis is None:
        return PartitionSpec()
    return PartitionSpec(*[None] * axis, mesh.axis_names[0])
