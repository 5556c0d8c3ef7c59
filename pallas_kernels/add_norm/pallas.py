"""The residual sum and its RMS norm as one kernel, a program a row; XLA makes two of it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton

# Channels of one thread.
_CHANNELS = 16


def add_norm(
    x: jax.Array, parts: jax.Array, scale: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """See `dispatch.add_norm`."""
    shape, width = x.shape, x.shape[-1]
    count = parts.shape[0]
    rows, padded = x.size // width, pl.next_power_of_2(width)

    def kernel(x_ref, parts_ref, scale_ref, total_ref, normed_ref):
        # x [rows, D], parts float32[S, rows, D], scale [D]
        row, column = pl.program_id(0), jnp.arange(padded)
        inside = column < width

        def load(ref):
            return pltriton.load(ref, mask=inside, other=0.0)

        added = load(parts_ref.at[0, row, column])
        for part in range(1, count):
            added += load(parts_ref.at[part, row, column])
        dtype = x_ref.dtype
        total = load(x_ref.at[row, column]).astype(jnp.float32)
        total = (total + added.astype(dtype).astype(jnp.float32)).astype(dtype)
        pltriton.store(total_ref.at[row, column], total, mask=inside)
        wide = total.astype(jnp.float32)
        inverse = lax.rsqrt(jnp.sum(wide * wide) / width + eps)
        normed = (wide * inverse).astype(dtype).astype(jnp.float32)
        normed *= load(scale_ref.at[column]).astype(dtype).astype(jnp.float32)
        pltriton.store(normed_ref.at[row, column], normed.astype(dtype), mask=inside)

    like = jax.ShapeDtypeStruct((rows, width), x.dtype)
    total, normed = platform.pallas_kernel(
        kernel,
        name="flexijax_add_norm",
        grid=(rows,),
        out_shape=[like, like],
        num_warps=min(16, max(1, padded // (32 * _CHANNELS))),
    )(x.reshape(rows, width), parts.reshape(count, rows, width), scale)
    return total.reshape(shape), normed.reshape(shape)
