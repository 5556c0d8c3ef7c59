"""What coded pages ask of a layer: values of their heads are rotated before they are kept.

Rotated, they have fewer outliers to spoil a token's range. Attention adds up values, so what comes
of it is rotated back instead of every page: the rotation is linear, and its own inverse.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.policies.base import HeadGroup
from flexijax.policies.codec import rotate


def coded_heads(groups: Iterable[HeadGroup]) -> tuple[int, ...]:
    """The KV heads of a layer of which pages are coded in one of the tiers."""
    return tuple(sorted(head for of in groups if of.codec is not None for head in of.heads))


def rotated(x: jax.Array, heads: tuple[int, ...]) -> jax.Array:
    """x [B, K, ..., H] with that of some heads rotated, or rotated back."""
    if not heads:
        return x
    if len(heads) == x.shape[1]:
        return rotate(x)
    mine = np.isin(np.arange(x.shape[1]), heads).reshape(-1, *(1,) * (x.ndim - 2))
    return jnp.where(jnp.asarray(mine), rotate(x), x)
