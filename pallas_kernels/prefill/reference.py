"""The oracle of prefill attention, in float64 NumPy, one query at a time."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flexijax.pallas_kernels.sparse_decode.reference import attend

Array = NDArray[np.float64]


def prefill_attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, start: int, *, scale: float
) -> tuple[Array, Array]:
    """Query t attends keys 0 .. start + t.

    q [T, K, G, H]; k [K, H, S]; v [K, S, H] -> out [T, K, G, H], lse [T, K, G].
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for t, h in np.ndindex(*q.shape[:2]):
        end = start + t + 1
        out[t, h], lse[t, h] = attend(q[t, h], k[h, :, :end].T, v[h, :end], scale=scale)
    return out, lse
