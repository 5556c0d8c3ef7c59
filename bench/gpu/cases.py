"""What a kernel is called with, what must come out, and what the cases of all of them share.

Every oracle is asked for a sample of rows: of the whole it would take minutes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.data import random_pages
from bench.gpu.sizes import Sizes
from flexijax.pallas_kernels import platform

BITS = 2
# Of a row against its norm, where keys, values and what comes out have 8 bits of mantissa; and of
# numbers that were summed in float32.
ROWS, NUMBERS = 1e-2, 1e-4
# Of each request, pages that an oracle of scores is asked for; and requests of attention's.
_SAMPLE, _ROWS = 24, 16


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: function(state, *args) -> (out, state), through `dispatch`, jitted.

    state: what is updated in place, and donated; () where nothing is. args: on the device, a small
    array first. error: of what came out and the state afterwards, infinite where anything else than
    what was to be written has changed. most: allowed. moved: bytes that must be read or written.
    """

    function: Callable[..., tuple[Any, Any]]
    state: Any
    args: tuple[Any, ...]
    error: Callable[[Any, Any], float]
    most: float
    moved: int


@functools.cache
def updates(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """function(state, *args) -> (out, state), jitted.

    The same object each time, so that a kernel is compiled once for all cases of one size.
    """
    return jax.jit(functools.partial(function, **static), donate_argnums=0)


def reads(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """The same of a function(*args) -> out that writes nothing in place."""
    return updates(_reading, reader=function, **static)


def _reading(state: Any, *args: Any, reader: Callable[..., Any], **static: Any) -> Any:
    return reader(*args, **static), state


def on_device(tree: Any) -> Any:
    """The same arrays in device memory."""
    return jax.device_put(tree, platform.sharding())


def scale(sizes: Sizes) -> float:
    """Of the logits."""
    return sizes.width**-0.5


def queries(sizes: Sizes, rng: np.random.Generator, batch: int) -> np.ndarray:
    """[B, K, G, H]."""
    made = rng.normal(size=(batch, sizes.heads, sizes.group, sizes.width))
    return made.astype(jnp.dtype(sizes.dtype))


def keys(sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """Pages [n, page, H], so large that a few win: to ignore their weights would be seen."""
    return random_pages(rng, sizes.page, sizes.width, dtype=sizes.dtype, scale=2)


def values(sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """Pages [n, page, H]."""
    return random_pages(rng, sizes.page, sizes.width, dtype=sizes.dtype, scale=1)


def chosen_pages(
    rng: np.random.Generator,
    sizes: Sizes,
    lengths: np.ndarray,
    *,
    heads: int,
    room: int,
    newest: int = 1,
) -> np.ndarray:
    """int32[B, heads, room]: pages that have begun, others of each head, -1 for none.

    The `newest` ones are among them, and the last place is taken wherever any is.
    """
    named = np.full((len(lengths), heads, room), -1, np.int32)
    for b, h in np.ndindex(*named.shape[:2]):
        begun = -(-int(lengths[b]) // sizes.page)
        older = max(0, begun - newest)
        pages = np.append(rng.permutation(older)[: room - newest], np.arange(older, begun))
        place = np.append(rng.permutation(room - 1), room - 1)
        named[b, h, place[room - len(pages) :]] = pages
    return named


def sample(rng: np.random.Generator, pages: int) -> np.ndarray:
    """Some of so many pages, the first and the last among them."""
    return np.unique(np.append(rng.integers(0, pages, _SAMPLE - 2), [0, pages - 1]))


def some_rows(batch: int) -> list[int]:
    """Some of so many requests, the first and the last among them."""
    return np.unique(np.linspace(0, batch - 1, min(batch, _ROWS)).astype(int)).tolist()


def exact(*held: bool) -> float:
    """The error of what must hold as it is: 0, or infinite."""
    return 0.0 if all(held) else float("inf")
