"""How page scores are divided among the programs of a GPU, for both of their GPU kernels."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

from flexijax.pallas_kernels.summaries import group_size

# Pages in the tile of one program. At 64, 16-bit tiles take so many registers that they spill on an
# A100; at 32, rows of 8-bit tiles are too short for loads of 128 bits.
_TILE = 32
_TILE_8_BIT = 64
# Of a tensor core: a matrix product has at least so many rows and columns.
_MIN_SIDE = 16


@dataclass(frozen=True)
class TuningConfig:
    """The sizes of one program's matrix products; all but `parts` are powers of two.

    tile_pages: pages, their rows; columns: query heads of a KV head, padded; part: channels of a
    product, those of one exponent where summaries have 8 bits; parts: such products of a key.
    """

    tile_pages: int
    columns: int
    part: int
    parts: int

    @classmethod
    def choose(cls, *, pages: int, group: int, width: int, quantized: bool) -> "TuningConfig":
        """For `pages` pages of a request, `group` query heads per KV head of `width` channels."""
        tile = min(_TILE_8_BIT if quantized else _TILE, max(_MIN_SIDE, pl.next_power_of_2(pages)))
        part = group_size(width) if quantized else pl.next_power_of_2(width)
        columns = max(_MIN_SIDE, pl.next_power_of_2(group))
        return cls(tile, columns, part, width // part if quantized else 1)
