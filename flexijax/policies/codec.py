"""What a rung of a ladder keeps its full pages in: fewer bits an element, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from flexijax.pallas_kernels import platform, sketches
from flexijax.pallas_kernels.page_codes import xla as codes
from flexijax.policies.page_score import PageShape


@dataclasses.dataclass(frozen=True)
class Codec:
    """Full pages in `bits` bits an element, 4 or 8: see `pallas_kernels/page_codes/xla.py`.

    Of 4, keys have one more. A page is coded once, when it is full; what it decodes to differs from
    it by at most half a step of its ranges. Values are rotated by whoever holds them (`rotate`),
    and so is what attention makes of them. Raises ValueError for other bits.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in codes.BITS:
            raise ValueError(f"bits={self.bits!r} of Codec must be one of {codes.BITS}")

    @property
    def name(self) -> str:
        """What a configuration calls it."""
        return f"int{self.bits}"

    def check(self, page: PageShape, argument: str) -> None:
        """Raises ValueError, naming the argument, where such pages cannot be coded."""
        each = codes.WORD // self.bits
        if page.head_dim % each:
            raise ValueError(
                f"{argument}={self.name!r} needs a head_dim that is a multiple of {each}, and the "
                f"model's is {page.head_dim}"
            )

    def words(self, page: PageShape) -> int:
        """32-bit words of a page of one KV head."""
        return codes.page_words(page.page_size, page.head_dim, self.bits)

    def page_bytes(self, page: PageShape) -> int:
        """Bytes of the keys and values of a page of one KV head, with their ranges."""
        return 4 * self.words(page)

    def empty(self, blocks: int, heads: int, page: PageShape) -> jax.Array:
        """Unwritten pages uint32[blocks, heads, words], in device memory."""
        shape = (blocks, heads, self.words(page))
        return jnp.zeros(shape, jnp.uint32, device=platform.sharding())

    def encode(self, k_pages: jax.Array, v_pages: jax.Array) -> jax.Array:
        """Full pages [..., page, H], values rotated -> uint32[..., words]."""
        return codes.encode(k_pages, v_pages, bits=self.bits)

    def decode(self, coded: jax.Array, page: PageShape) -> tuple[jax.Array, jax.Array]:
        """The inverse: k, v [..., page, H] in the dtype of `page`, values still rotated."""
        made = codes.decode(coded, page=page.page_size, width=page.head_dim, bits=self.bits)
        k, v = (codes.narrowed(x, page.dtype) for x in made)
        return k, v


def rotate(v: jax.Array) -> jax.Array:
    """Values [..., H] rotated, or rotated back, in their dtype; the matrix is its own inverse.

    A head_dim that is no power of two is rotated in equal blocks of the greatest that divides it.
    """
    return sketches.rotate(v).astype(v.dtype)


CODECS: Mapping[str, Codec] = MappingProxyType({"int8": Codec(8), "int4": Codec(4)})
