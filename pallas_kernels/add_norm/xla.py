"""The residual sum and its RMS norm in plain XLA."""

import jax
import jax.numpy as jnp


def add_norm(
    x: jax.Array, parts: jax.Array, scale: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See `dispatch.add_norm`."""
    total = x + parts.sum(0).astype(x.dtype)
    return total, rms_norm(total, scale, eps=eps)


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Divides the last axis of x by its root mean square, computed in float32, times scale.

    x [..., D], scale [D] -> [..., D] in x's dtype.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
    return (x32 * inverse).astype(x.dtype) * scale.astype(x.dtype)
