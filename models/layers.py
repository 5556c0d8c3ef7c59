"""The parts of a decoder layer: RMS norm, rotary embedding, linear maps.

Weights are stored the way the fastest program reads them; `Linear` holds the reason and the ratios.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexijax.models.config import ModelConfig, RopeScaling
from flexijax.pallas_kernels import dispatch, platform
from flexijax.pallas_kernels.add_norm.xla import rms_norm


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians by which a pair of channels is rotated per position: float32[head_dim / 2].

    theta ** (-2i / head_dim) (RoFormer, Su et al. 2021), stretched as `RopeScaling` says.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / np.float32(scaling.factor)
    low, high, original = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position,
    )
    assert low is not None and high is not None and original is not None
    rotations = original * frequency / (2 * np.pi)  # in the original context
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (frequency * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def rope_tables(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles, shared by all layers.

    positions int32[B, T] -> two float32[B, T, 1, H / 2].
    """
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def tables(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angle = positions.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
        return jnp.cos(angle), jnp.sin(angle)

    def once(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        # XLA's CPU compiler would work out every angle again in every layer and head, a twentieth
        # of a prefill. A barrier is gone before it fuses; but it does not look into a branch.
        zeros = jnp.zeros((*positions.shape, 1, len(frequency)))
        return jax.lax.cond(positions[0, 0] >= 0, tables, lambda _: (zeros, zeros), positions)

    return jax.lax.platform_dependent(positions, cpu=once, default=tables)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channels i and i + H/2 by the position's angle (the Hugging Face pairing).

    x [B, T, heads, H], cos and sin float32[B, T, 1, H / 2] -> [B, T, heads, H] in x's dtype.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


# Products of a few rows are written as so many on a CPU, each with a part of the kernel.
_PARTS = 8


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W^T, accumulated in float32: x [B, T, I], kernel [O, I] -> float32[B, T, O].

    Kernels are stored [out, in], as the files have them. Measured with the shapes of SmolLM2, 24
    kernels one after the other, float32, 2 CPU cores: one product of 2, 4 and 8 rows takes 1.4 to
    1.6 times as long as a batch of eight products, one with each eighth of the kernel, and multiply
    and sum 1.1 to 1.5 times. At one row, and from 9 on, all are the same.

    A row's bits do not depend on how many rows there are, from 2 to 8: all are made 8, at a tenth
    more time for 2 and 4. Later jax takes other kernels, with sums in another order, for fewer.
    """
    rows = x.shape[0] * x.shape[1]
    few = 1 < rows <= platform.MAX_ALIKE_ROWS
    if few and x.dtype == kernel.dtype == jnp.float32:
        return jax.lax.platform_dependent(x, kernel, cpu=_in_parts, default=_whole)
    return _whole(x, kernel)


def _whole(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum("BTI,OI->BTO", x, kernel, preferred_element_type=jnp.float32)


def _in_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    alike = jnp.pad(rows, ((0, platform.MAX_ALIKE_ROWS - len(rows)), (0, 0)))
    count = _PARTS if len(kernel) % _PARTS == 0 else 1
    parts = kernel.reshape(count, -1, kernel.shape[1])
    y = jnp.einsum("RI,POI->PRO", alike, parts)[:, : len(rows)]
    return y.transpose(1, 0, 2).reshape(*x.shape[:2], -1)


def over_devices(parts: jax.Array, axis: str | None) -> jax.Array:
    """Parts [S, ...] of a sum as one part, that of all devices of a mesh's axis; None: as it is."""
    return parts if axis is None else jax.lax.psum(parts.sum(0), axis)[None]


class Linear(nnx.Module):
    """y = x W^T (+ b), accumulated in float32, result in x's dtype."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool, dtype, rngs: nnx.Rngs) -> None:
        kernel = jax.random.normal(rngs.params(), (out_size, in_size), jnp.float32)
        self.kernel = nnx.Param((kernel * in_size**-0.5).astype(dtype))
        if bias:
            # Small and random rather than zero, so that a test notices a bias left out.
            noise = jax.random.normal(rngs.params(), (out_size,), jnp.float32)
            self.bias = nnx.Param((noise * 0.02).astype(dtype))
        self.use_bias = bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, in] -> [B, T, out]."""
        y = project(x, self.kernel[...])
        if self.use_bias:
            y = y + self.bias[...].astype(jnp.float32)[None, None, :]
        return y.astype(x.dtype)

    def parts(self, x: jax.Array) -> jax.Array:
        """x [B, T, in] -> float32[S, B, T, out], of which the sum is y; without a bias."""
        assert not self.use_bias
        kernel = self.kernel[...]
        count = platform.product_parts(rows=x.shape[0] * x.shape[1], inner=x.shape[2])
        if count == 1:
            return project(x, kernel)[None]
        return jnp.einsum(
            "BTSI,OSI->SBTO",
            x.reshape(*x.shape[:2], count, -1),
            kernel.reshape(len(kernel), count, -1),
            preferred_element_type=jnp.float32,
        )


class RMSNorm(nnx.Module):
    """`rms_norm` with its scale."""

    def __init__(self, size: int, *, eps: float, dtype) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., size] -> [..., size]."""
        return rms_norm(x, self.scale[...], eps=self.eps)

    def after_sum(self, x: jax.Array, parts: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x [..., size] + sum of parts, see `Linear.parts`, and its norm; None adds nothing."""
        if parts is None:
            return x, self(x)
        return dispatch.add_norm(x, parts, self.scale[...], eps=self.eps)
