"""The oracle of the residual sum and its norm, in float64 NumPy."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def add_norm(
    x: ArrayLike, parts: ArrayLike, scale: ArrayLike, *, eps: float
) -> tuple[Array, Array]:
    """See `dispatch.add_norm`."""
    total = np.asarray(x, np.float64) + np.asarray(parts, np.float64).sum(0)
    mean = np.square(total).mean(-1, keepdims=True)
    return total, total / np.sqrt(mean + eps) * np.asarray(scale, np.float64)
