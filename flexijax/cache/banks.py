"""Arrays by row and arrays by block: a cache holds the former in banks, the latter once.

What decode attention of a CPU reads at once should be one array, and what it does not read should
not be there. So rows lie in banks of one, and a program takes those of the rows that run. A GPU's
kernels pass over rows that take no part, and there all rows are one bank.

A head group says which of its arrays lie by block (`BY_BLOCK`), and which of them decode steps read
(`READ`) or write (`WRITTEN`): each array that goes through a program takes microseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def only(group: Any, names: Sequence[str]) -> Any:
    """The group's arrays of these names; None for the others."""
    fields = (field.name for field in dataclasses.fields(group))
    return type(group)(*(getattr(group, name) if name in names else None for name in fields))


def by_block(group: Any) -> Any:
    """The group's arrays that lie by block, which all rows share; None for the others."""
    return only(group, group.BY_BLOCK)


def by_row(group: Any) -> Any:
    """The group's arrays that lie by row; None for the others."""
    return dataclasses.replace(group, **dict.fromkeys(group.BY_BLOCK))


def together(*parts: Any) -> Any:
    """The group of which these are parts; of an array that several have, the last."""
    there = (vars(part).items() for part in parts)
    named = {name: value for part in there for name, value in part if value is not None}
    return dataclasses.replace(parts[0], **named)


def side_by_side(banks: Sequence[Any]) -> Any:
    """Trees of arrays [b, ...] of some banks as one of arrays [sum of b, ...]; of one, itself."""
    if len(banks) == 1:
        return banks[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *banks)


def apart(tree: Any, banks: int, axis: int = 0) -> list[Any]:
    """The inverse of `side_by_side`, of banks of equal size."""
    if banks == 1:
        return [tree]
    leaves, structure = jax.tree.flatten(tree)
    parts = [jnp.split(leaf, banks, axis=axis) for leaf in leaves]
    return [structure.unflatten([part[bank] for part in parts]) for bank in range(banks)]
