"""Prepared queries in plain XLA."""

import jax

from flexijax.pallas_kernels.queries import HeadQueries, grouped
from flexijax.pallas_kernels.sketches import SketchCode, SketchQuery, prepare


def sketch_query(
    q: jax.Array | HeadQueries, code: SketchCode, *, bits: int, scale: float
) -> SketchQuery:
    """See `dispatch.sketch_query`."""
    return prepare(grouped(q), code, bits=bits, scale=scale)
