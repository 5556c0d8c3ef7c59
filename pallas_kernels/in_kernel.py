"""What the bodies of several Pallas kernels do."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexijax.pallas_kernels.platform import pltriton


def find_slot(
    slot_page_ref: Any, request: jax.Array, head: jax.Array, page: jax.Array, *, slots: int
) -> jax.Array:
    """int32[]: the slot of a head that holds a page, -1 where none does or the page is negative.

    slot_page_ref: int32[B, K, S], the page in each of the S = `slots` slots.
    """
    slot = jnp.arange(pl.next_power_of_2(slots))
    held = pltriton.load(slot_page_ref.at[request, head, slot], mask=slot < slots, other=-1)
    return jnp.max(jnp.where((held == page) & (page >= 0), slot, -1))
