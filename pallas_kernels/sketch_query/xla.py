"""Prepared queries in plain XLA."""

from flexijax.pallas_kernels.sketches import prepare as sketch_query

__all__ = ["sketch_query"]
