"""Where weights go, and whether they fit there."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import numpy as np

from flexijax.models.errors import LoadError
from flexijax.pallas_kernels.host_memory import available_host_bytes

# One sharding for all weights, or one for each shape; None is the default device.
Placement: TypeAlias = (
    jax.sharding.Sharding | Callable[[tuple[int, ...]], jax.sharding.Sharding] | None
)


def placed(sharding: Placement, shape: tuple[int, ...]) -> jax.sharding.Sharding | None:
    """The sharding of one weight."""
    return sharding(shape) if callable(sharding) else sharding


def check_memory(
    shapes: Iterable[tuple[int, ...]], *, dtype: Any, sharding: Placement, description: str
) -> None:
    """LoadError, with the arithmetic, where weights of these shapes do not fit into memory.

    On the host, beside what stays there, the largest weight is held once more: it is put together
    before it is placed. description: of the model, for the error.
    """
    size, largest = np.dtype(dtype).itemsize, 0
    on = collections.Counter()  # bytes by device, None for the host
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for shape in shapes:
        largest = max(largest, math.prod(shape) * size)
        where = placed(sharding, shape) or default
        on_host = where.memory_kind in ("pinned_host", "unpinned_host")
        for device in where.addressable_devices:
            place = None if on_host or device.platform == "cpu" else device
            on[place] += math.prod(where.shard_shape(shape)) * size
    problems = []
    available = available_host_bytes()
    if on[None] + largest > available:
        problems.append(
            f"host memory: the weights take {on[None]:,} bytes in {np.dtype(dtype).name}, and the "
            f"largest {largest:,} once more while it is read; {available:,} bytes are available"
        )
    for device, needed in on.items():
        stats = device.memory_stats() if device is not None else None
        if stats is not None and needed > (free := stats["bytes_limit"] - stats["bytes_in_use"]):
            problems.append(
                f"{device}: the weights take {needed:,} bytes in {np.dtype(dtype).name}; "
                f"{free:,} bytes are free"
            )
    if problems:
        raise LoadError(description, problems)
