"""How sketch scores are divided among the programs of a GPU, for both of their GPU kernels."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

# Tokens in the tile of one program.
_TILE_TOKENS = 128
# Of a tensor core: a matrix product has at least so many rows and columns.
_MIN_SIDE = 16


@dataclass(frozen=True)
class TuningConfig:
    """The sizes of one program's matrix products, both powers of two.

    tile_pages: pages, whose tokens are the rows, at least 16 together; columns: query heads of a KV
    head, padded.
    """

    tile_pages: int
    columns: int

    @classmethod
    def choose(cls, *, pages: int, page_size: int, group: int) -> "TuningConfig":
        """For `pages` pages of a request, `group` query heads per KV head."""
        tile = min(max(1, _TILE_TOKENS // page_size), pl.next_power_of_2(pages))
        tile = max(tile, -(-_MIN_SIDE // page_size))
        return cls(tile, max(_MIN_SIDE, pl.next_power_of_2(group)))
