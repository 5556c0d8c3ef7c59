"""Arrays as large as in use, made on the device from a few random pages that the host knows too.

What an array holds at any place is then known without reading it back through the indexing that is
being tested.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexijax.pallas_kernels import platform

# A prime, so that no stride of an array meets the same page again.
DISTINCT = 509


def random_pages(rng: np.random.Generator, *shape: int, dtype: str, scale: float) -> np.ndarray:
    """Normal numbers [n, *shape], n pages of that shape."""
    made = rng.normal(size=(DISTINCT, *shape), scale=scale)
    return made.astype(jnp.dtype(dtype))


def sources(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """int32[*shape]: which of the random pages stands at each place."""
    return rng.integers(0, DISTINCT, shape, dtype=np.int32)


def spread(base: np.ndarray, source: np.ndarray, counts: np.ndarray | None = None) -> jax.Array:
    """base [n, page, H], source int32[...] -> [..., page, H] in device memory.

    counts: int32[...], tokens of each page that are there; NaN stands in the others. None: all are.
    """
    where = platform.sharding()
    filled = None if counts is None else jax.device_put(counts, where)
    return _spread(jax.device_put(base, where), jax.device_put(source, where), filled)


def changed_tokens(
    made: jax.Array,
    base: np.ndarray,
    source: np.ndarray,
    counts: np.ndarray,
    at: tuple[np.ndarray, ...],
    *,
    channels_first: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens [..., page] of an array are not those of `spread`, bit for bit.

    With what is there now at the tokens `at`, [n, H]. channels_first: made is [B, K, H, S, page].
    """
    given = jax.device_put((base, source, counts, at), platform.sharding())
    changed, there = _changed_tokens(made, *given, channels_first=channels_first)
    return np.asarray(changed), np.asarray(there)


@functools.partial(jax.jit, static_argnames="channels_first")
def _changed_tokens(
    made: jax.Array,
    base: jax.Array,
    source: jax.Array,
    counts: jax.Array,
    at: tuple[jax.Array, ...],
    *,
    channels_first: bool,
) -> tuple[jax.Array, jax.Array]:
    there = made[(*at[:2], slice(None), *at[2:])] if channels_first else made[at]
    if channels_first:
        made = made.transpose(0, 1, 3, 4, 2)
    return (_bits(made) != _bits(_spread(base, source, counts))).any(-1), there


def changed_pages(made: jax.Array, base: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Like `source`: which pages of an array are not those of `spread`, bit for bit."""
    return np.asarray(_changed_pages(made, *jax.device_put((base, source), platform.sharding())))


@jax.jit
def _changed_pages(made: jax.Array, base: jax.Array, source: jax.Array) -> jax.Array:
    differs = _bits(made) != _bits(_spread(base, source, None))
    return differs.any(tuple(range(source.ndim, made.ndim)))


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


@jax.jit
def _spread(base: jax.Array, source: jax.Array, counts: jax.Array | None) -> jax.Array:
    made = jnp.take(base, source, axis=0)
    if counts is None:
        return made
    token = jnp.arange(base.shape[1], dtype=jnp.int32)[:, None]
    return jnp.where(token < counts[..., None, None], made, jnp.asarray(jnp.nan, made.dtype))


def block_table(
    rng: np.random.Generator, lengths: np.ndarray, *, blocks: int, pages: int, page: int
) -> np.ndarray:
    """int32[B, P]: blocks all over a pool; 2**30 beyond a request.

    The pool's last two are the first page of the first request and the newest of the last one.
    """
    begun = -(-lengths // page)
    drawn = rng.choice(blocks - 2, int(begun.sum()), replace=False)
    drawn[0], drawn[-1] = blocks - 1, blocks - 2
    table = np.full((len(lengths), pages), 2**30, np.int32)
    table[np.arange(pages) < begun[:, None]] = drawn
    return table


def odd_lengths(batch: int, most: int, page: int) -> np.ndarray:
    """int32[B]: lengths around the bounds of pages, a request without tokens, and the longest."""
    wanted = [most, most - 1, 0, page + 1, 1, page - 1, page, most // 2 + 1]
    wanted += [most - 1 - 17 * at for at in range(batch)]
    return np.array(wanted[:batch], np.int32).clip(0, most)


def row_error(actual: object, expected: np.ndarray) -> float:
    """The greatest error of a row (the last axis) over its norm; infinite where it is no number."""
    found = np.asarray(actual, np.float64)
    error = np.linalg.norm(found - expected, axis=-1)
    norm = np.linalg.norm(expected, axis=-1)
    shares = np.where(error == 0, 0.0, error / np.where(norm == 0, np.finfo(float).tiny, norm))
    return float(np.where(np.isnan(shares), np.inf, shares).max(initial=0.0))


def number_error(actual: object, expected: np.ndarray) -> float:
    """The greatest error over max(1, |expected|); infinite where -inf does not meet -inf."""
    found = np.asarray(actual, np.float64)
    finite = np.isfinite(expected)
    if not (found[~finite] == expected[~finite]).all():
        return float("inf")
    error = np.abs(found[finite] - expected[finite]) / np.maximum(1, np.abs(expected[finite]))
    return float(np.where(np.isnan(error), np.inf, error).max(initial=0.0))


def same_bits(actual: object, expected: object) -> bool:
    """Whether two arrays are equal bit for bit, NaN included."""
    found, wanted = np.asarray(actual), np.asarray(expected)
    if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
        return False
    as_bits = f"uint{8 * found.dtype.itemsize}"
    return bool(np.array_equal(found.view(as_bits), wanted.view(as_bits)))
