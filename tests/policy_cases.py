"""Texts of random queries and keys, and what a cache shows a policy of them, made by hand."""

import jax
import numpy as np

from flexijax.policies.base import HeadGroup, Tier, Tokens, Window

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5


def random_text(seed, *, query_heads, length):
    """q float32[G, S, H] and k float32[S, H], with attention that is far from even."""
    rng = np.random.default_rng(seed)
    q = 3 * rng.standard_normal((query_heads, length, HEAD_DIM))
    return q.astype(np.float32), rng.standard_normal((length, HEAD_DIM)).astype(np.float32)


def make_tokens(k, position, *, length):
    """Tokens of layer 0; position: int[T], -1 for none."""
    position = np.asarray(position, np.int32)
    return jax.device_put(Tokens(k, k, position, np.int32(length), np.int32(0)))


def make_window(q, q_position, k, position):
    """The queries q [G, W, H] at int[W] over the keys k [T, H] at int[T], -1 for none."""
    q_position, position = np.asarray(q_position, np.int32), np.asarray(position, np.int32)
    sees = (position >= 0) & (position <= q_position[:, None]) & (q_position >= 0)[:, None]
    logits = np.where(sees, np.float32(SCALE) * (q @ k.T), np.float32(-np.inf))
    lse = np.logaddexp.reduce(logits, axis=-1)
    return jax.device_put(Window(q, q_position, logits, lse))


def evicting(room):
    """A group of one head that keeps `room` tokens."""
    return HeadGroup((0,), (Tier(room),), unit="token")


def kept_by(rank, room):
    """The indices of the `room` greatest, ascending; all where there are fewer."""
    return np.sort(np.argsort(np.asarray(rank), kind="stable")[::-1][:room])


def assert_keeps_the_best(rank, expected, room):
    """The `room` greatest of `rank` are those of `expected`; equal values may stand in."""
    expected = np.asarray(expected, np.float64)
    observed = np.sort(expected[kept_by(rank, room)])
    np.testing.assert_allclose(observed, np.sort(expected)[::-1][:room][::-1], rtol=1e-5)
