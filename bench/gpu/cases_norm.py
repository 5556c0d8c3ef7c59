"""The residual sum of a matrix product's parts, and its norm."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from bench.gpu.cases import ROWS, Case, exact, on_device, reads, some_rows
from bench.gpu.data import row_error
from bench.gpu.sizes import Sizes
from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.add_norm import reference

_PARTS, _EPS = 4, 1e-5


def add_norm(sizes: Sizes, lengths: np.ndarray, rng: np.random.Generator, *, blocks: int) -> Case:
    """A row for each request, as wide as all query heads together."""
    rows, width = len(lengths), sizes.heads * sizes.group * sizes.width
    dtype = jnp.dtype(sizes.dtype)
    x = rng.normal(size=(rows, width)).astype(dtype)
    parts = rng.normal(size=(_PARTS, rows, width)).astype(np.float32)
    scale = (1 + 0.2 * rng.normal(size=width)).astype(dtype)

    def error(out: Any, state: Any) -> float:
        wanted = reference.add_norm(x, parts, scale, eps=_EPS)
        worst = [exact(all(bool(jnp.isfinite(one).all()) for one in out))]
        for made, expected in zip(out, wanted, strict=True):
            found = np.asarray(made, np.float32)
            worst += [row_error(found[row], expected[row]) for row in some_rows(rows)]
        return max(worst)

    moved = 3 * x.nbytes + parts.nbytes + scale.nbytes
    function = reads(dispatch.add_norm, eps=_EPS)
    return Case(function, (), on_device((x, parts, scale)), error, ROWS, moved)
