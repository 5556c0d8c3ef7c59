"""Queries of some KV heads where they lie, so that what reads them needs no copy of its own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HeadQueries:
    """Row head * G + g of rows is query head g of KV head `head`; other rows are anything."""

    rows: jax.Array  # float[B, M, H]
    heads: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # the K that are meant
    group: int = dataclasses.field(metadata={"static": True})  # G

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """B, K, G, H: of the array that `grouped` makes."""
        batch, _, width = self.rows.shape
        return batch, len(self.heads), self.group, width


def grouped(q: jax.Array | HeadQueries) -> jax.Array:
    """float[B, K, G, H]; on a GPU a launch that copies, unless it is in what XLA fuses."""
    if not isinstance(q, HeadQueries):
        return q
    firsts = [head * q.group for head in q.heads]
    return jnp.stack([q.rows[:, first : first + q.group] for first in firsts], axis=1)
