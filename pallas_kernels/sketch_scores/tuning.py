"""How sketch scores are divided among the programs of a GPU, for both of their GPU kernels."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

_THREADS = 128
# Products that a thread adds up at a time, of its tokens and the query heads: what registers hold.
_MAX_SUMS = 16
# Programs that keep an H100 or A100 busy, before a thread is given more than one token.
_PROGRAMS = 512


@dataclass(frozen=True)
class TuningConfig:
    """tile_pages: pages of one program, a power of two; num_warps: of it."""

    tile_pages: int
    num_warps: int

    @classmethod
    def choose(cls, *, pages: int, page_size: int, group: int, heads: int) -> "TuningConfig":
        """For `pages` pages of each of `heads` = B * K heads, of `group` query heads each."""
        tokens = pl.next_power_of_2(pages) * page_size
        tile = _THREADS
        # More tokens a thread read each weight once for all of them.
        while (
            2 * tile // _THREADS * group <= _MAX_SUMS
            and heads * pl.cdiv(tokens, 2 * tile) >= _PROGRAMS
        ):
            tile *= 2
        tile = max(min(tile, tokens), page_size)
        return cls(tile // page_size, max(1, min(_THREADS, tile) // 32))
