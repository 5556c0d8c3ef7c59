"""What staged moves are made of: page by page, in a loop as long as there are pages to move."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def entries(plan: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Indices of the entries of `plan` that are not negative, packed to the front, and how many."""
    named = plan >= 0
    return jnp.nonzero(named, size=plan.size, fill_value=0), named.sum(dtype=jnp.int32)


def to_host_index(index: tuple) -> tuple[jax.Array, ...]:
    """The operands of one primitive must lie in one memory space, indices included."""
    return tuple(to_host(jnp.asarray(i, jnp.int32)) for i in index)


def to_host(x: jax.Array) -> jax.Array:
    """In host memory."""
    return jax.device_put(x, jax.memory.Space.Host)


def to_device(x: jax.Array) -> jax.Array:
    """In device memory."""
    return jax.device_put(x, jax.memory.Space.Device)
