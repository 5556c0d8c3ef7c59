"""A running softmax over a list of pages, as the Pallas kernels of decode attention share it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sparse_decode.tuning import TuningConfig

LOG2_E = math.log2(math.e)


class Carry(NamedTuple):
    """A running softmax over tokens, its logits in base 2: R rows, of which G are query heads."""

    peak: jax.Array  # float32[R]
    total: jax.Array  # float32[R]
    out: jax.Array  # float32[R, H]


def empty_carry(rows: int, width: int) -> Carry:
    """Of no token yet."""
    return Carry(
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        jnp.zeros((rows, pl.next_power_of_2(width)), jnp.float32),
    )


def load_query(q_ref, lead, first, group: int, rows: int, width: int) -> jax.Array:
    """[R, H] with both axes padded: rows first .. first + G - 1 of q_ref[lead]."""
    row, column = jnp.arange(rows), jnp.arange(pl.next_power_of_2(width))
    inside = (row < group)[:, None] & (column < width)[None, :]
    at = q_ref.at[(*lead, (first + row)[:, None], column[None, :])]
    return pltriton.load(at, mask=inside, other=0.0)


def softmax_over(
    q: jax.Array,
    k_ref,  # [rows, H], or with `at` [B, K, H, n * page]
    v_ref,  # [rows, H]
    source: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    carry: Carry,
    *,
    split: jax.Array,
    at: tuple[jax.Array, jax.Array] | None,
    pages: int,
    page: int,
    width: int,
    scale: float,
    config: TuningConfig,
) -> Carry:
    """The carry after the tokens of one split of a list of pages.

    source(index, listed): of each token's place in the list, int32[block], how many tokens of its
    page count, and which page of v_ref it is. at: batch row and head of keys whose channels stand
    before their tokens.
    """
    block, column = config.block_tokens, jnp.arange(q.shape[1])
    in_width = (column < width)[None, :]
    # Without this, float32 would be rounded to ten bits of mantissa on its way into tensor cores.
    precision = platform.float32_precision() if k_ref.dtype == jnp.float32 else None

    def step(i, carry):
        peak, total, out = carry
        token = (split * config.steps + i) * block + jnp.arange(block)
        index, place = token // page, token % page  # [block]
        listed = index < pages
        count, stored = source(index, listed)
        valid = place < count
        # What is not valid may hold anything, and 0 * NaN is NaN. Values are read under a mask;
        # keys only decide logits of their own, which are dropped.
        if at is not None:
            # One condition for the whole block: with one per token, loads along the tokens would
            # shrink from 128 bits to single numbers.
            needed = (jnp.max(count) > 0) & (token < pages * page)
            k = pltriton.load(
                k_ref.at[(*at, column[:, None], token[None, :])],
                mask=(column < width)[:, None] & needed[None, :],
                other=0.0,
            )
            logits = scale * _dot(q, k, (1, 0), precision)
        else:
            k = pltriton.load(
                k_ref.at[(stored * page + place)[:, None], column[None, :]],
                mask=valid[:, None] & in_width,
                other=0.0,
            )
            logits = scale * _dot(q, k, (1, 1), precision)
        v = pltriton.load(
            v_ref.at[(stored * page + place)[:, None], column[None, :]],
            mask=valid[:, None] & in_width,
            other=0.0,
        )
        logits = jnp.where(valid[None, :], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        safe = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        shrink = jnp.exp2(peak - safe)
        weights = jnp.exp2(logits - safe[:, None])
        total = total * shrink + jnp.sum(weights, axis=1)
        out = out * shrink[:, None] + _dot(weights.astype(v.dtype), v, (1, 0), precision)
        return Carry(new_peak, total, out)

    return lax.fori_loop(0, config.steps, step, carry)


def normalized(carry: Carry) -> tuple[jax.Array, jax.Array]:
    """out float32[R, H] and its log-sum-exp float32[R]; 0 and -inf of no token."""
    peak, total, out = carry
    out = out / jnp.where(total == 0.0, 1.0, total)[:, None]
    return out, jnp.where(total == 0.0, -jnp.inf, (peak + jnp.log2(total)) / LOG2_E)


def _dot(a, b, contract, precision):
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
