"""The oracle of prepared queries, in float64 NumPy."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexijax.pallas_kernels.sketch_scores.reference import hadamard

Array = NDArray[np.float64]


def sketch_query(
    q: ArrayLike, mean: ArrayLike, step: ArrayLike, *, bits: int, scale: float
) -> tuple[Array, Array, Array]:
    """q [B, K, G, H], mean and step [B, K, H] -> weights [B, K, G, H], not yet rounded, and
    offset and unit [B, K, G], of which offset counts with the weights rounded."""
    q, mean, step = (np.asarray(x, np.float64) for x in (q, mean, step))
    rotated = scale * q @ hadamard(q.shape[-1])
    exact = rotated * step[:, :, None]
    unit = np.maximum(np.abs(exact).max(-1), 1e-30) / 31
    weights = exact / unit[..., None]
    middle = unit * np.round(weights).sum(-1) * (2**bits - 1) / 2
    return weights, (rotated * mean[:, :, None]).sum(-1) - middle, unit
