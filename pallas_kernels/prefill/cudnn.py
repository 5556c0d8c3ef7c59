"""Prefill attention by cuDNN's flash attention, for GPUs that have it."""

import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import platform


def fits(q: jax.Array) -> bool:
    """Whether cuDNN is here and takes these queries [..., H]: 16 bits, H up to 128 in eights."""
    if not platform.is_gpu() or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    try:
        return importlib.util.find_spec("nvidia.cudnn") is not None
    except ModuleNotFoundError:
        return False


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    backend: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """As `dispatch.prefill_attention`: query t stands at position start + t.

    cuDNN's own causal mask begins its diagonal at the first key, so the offset goes into a bias,
    [T, S] in the dtype of q.

    Args:
      q: float[T, K, G, H]; k: float[K, H, S], channels before tokens; v: float[K, S, H].
      start: int32[]. backend: "xla" computes the same without a GPU.
    Returns:
      [T, K, G, H] in the dtype of q.
    """
    tokens, heads, group, width = q.shape
    position = start + jnp.arange(tokens)
    attended = jnp.arange(k.shape[2])[None, :] <= position[:, None]
    # Not -inf: cuDNN may add it to a masked block's maximum, and inf - inf is NaN.
    bias = jnp.where(attended, 0, jnp.finfo(q.dtype).min / 2).astype(q.dtype)
    # Keys and values beyond the chunk were never written: 0 * NaN must not reach the sum.
    written = (jnp.arange(k.shape[2]) < start + tokens)[:, None, None]
    # Half of the heads at a time, since cuDNN's order of axes is another: what is copied for it
    # takes as much memory as the keys and values themselves.
    halves = 2 if heads % 2 == 0 else 1
    found = [
        jax.nn.dot_product_attention(
            q[:, mine].reshape(1, tokens, -1, width),
            jnp.where(written, k[mine].transpose(2, 0, 1), 0)[None],
            jnp.where(written, v[mine].transpose(1, 0, 2), 0)[None],
            bias=bias[None, None],
            scale=scale,
            implementation=backend,
        ).reshape(tokens, -1, group, width)
        for mine in (slice(at, at + heads // halves) for at in range(0, heads, heads // halves))
    ]
    return jnp.concatenate(found, axis=1)
