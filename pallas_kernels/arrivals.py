"""Parts of one result that several programs of a kernel make: the last to arrive merges them.

Each part is written to memory before its program arrives; whoever arrives last, by a counter that
all of them raise, sees what all others wrote. So no launch of its own merges. Source: split-K with
a semaphore, and CUDA's sample threadFenceReduction.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.platform import pltriton

# Numbers read at a time, of as many parts as that is: what registers hold, and the more there are,
# the fewer times memory is waited for.
_VALUES = 4096


def is_last(arrivals_ref: Any, at: tuple[jax.Array, ...], parts: int) -> jax.Array:
    """bool[]: whether the `parts` programs that share arrivals_ref[at] have all come here.

    arrivals_ref: int32[...], 0 before the first arrives, and 0 again after the last one has.
    """
    last = platform.arrive(arrivals_ref, at) == parts - 1

    @pl.when(last)
    def _():
        arrivals_ref[at] = jnp.int32(0)

    return last


def merge_parts(parts: tuple[Any, ...], out_ref: Any, at: tuple[jax.Array, jax.Array]) -> None:
    """What `partials.merge` says, of one head: out_ref[at] from all of its parts.

    parts: refs of outs float32[splits, B, K, G, H] and lses float32[splits, B, K, G]. out_ref:
    [B, K, G, H]. at: request and head. In the order of the parts, whichever came last.
    """
    outs_ref, lses_ref = parts
    splits, _, _, group, width = outs_ref.shape
    row, column = jnp.arange(pl.next_power_of_2(group)), jnp.arange(pl.next_power_of_2(width))
    inside = (row < group)[:, None] & (column < width)[None, :]
    at_once = max(1, min(_VALUES // inside.size, pl.next_power_of_2(splits)))

    def load_lses(part):
        mask = (part < splits)[:, None] & (row < group)[None, :]
        index = (part[:, None], *at, row[None, :])
        return pltriton.load(lses_ref.at[index], mask=mask, other=-jnp.inf)

    lses = load_lses(jnp.arange(pl.next_power_of_2(splits)))
    peak = jnp.max(lses, axis=0)
    safe = jnp.where(peak == -jnp.inf, 0.0, peak)
    total = jnp.sum(jnp.exp(lses - safe[None, :]), axis=0)

    def add(step, out):
        part = step * at_once + jnp.arange(at_once)
        weights = jnp.exp(load_lses(part) - safe[None, :])
        index = (part[:, None, None], *at, row[None, :, None], column[None, None, :])
        mask = (part < splits)[:, None, None] & inside[None]
        values = pltriton.load(outs_ref.at[index], mask=mask, other=0.0)
        return out + jnp.sum(values * weights[:, :, None], axis=0)

    out = lax.fori_loop(0, pl.cdiv(splits, at_once), add, jnp.zeros(inside.shape, jnp.float32))
    out = out / jnp.where(total == 0.0, 1.0, total)[:, None]
    pltriton.store(
        out_ref.at[(*at, row[:, None], column[None, :])], out.astype(out_ref.dtype), mask=inside
    )
