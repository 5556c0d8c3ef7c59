"""How decode attention is divided among the programs of a GPU, for both of its GPU kernels."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform

# Programs that a multiprocessor runs at once, of 128 threads with 128 registers each. One more than
# all of them run together, and all wait for a second wave.
_RESIDENT = 4
_MAX_SPLITS = 64
# Of a tensor core: the query heads are padded to so many rows of the matrix products.
MIN_ROWS = 16


@dataclass(frozen=True)
class TuningConfig:
    """How the pages of one head are divided among programs.

    block_tokens: tokens of one step of the running softmax, a power of two, at least 16; steps:
    such blocks of one program; splits: programs of one head.
    """

    block_tokens: int
    steps: int
    splits: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.block_tokens < 16 or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(f"{self.block_tokens=} must be a power of two, at least 16")

    @classmethod
    def choose(cls, *, heads: int, tokens: int, row_bytes: int) -> "TuningConfig":
        """For `heads` = B * K independent heads of `tokens` slots of `row_bytes` bytes of keys."""
        programs = _RESIDENT * platform.multiprocessors()
        widest = max(16, min(64, 16384 // row_bytes))
        block = 16
        while block < widest and heads * pl.cdiv(tokens, 2 * block) >= programs // 2:
            block *= 2
        blocks = pl.cdiv(tokens, block)
        splits = min(blocks, _MAX_SPLITS, max(1, programs // heads))
        steps = pl.cdiv(blocks, splits)
        warps = 2 if block * row_bytes <= 4096 else 4 if row_bytes <= 256 else 8
        # The third stage reads page numbers ahead of pages. An A100 takes 142 registers with it
        # instead of 128, and a fourth of its programs would wait for a second wave.
        stages = 1 if steps == 1 else 3 if platform.compute_capability() >= 90 else 2
        return cls(block, steps, pl.cdiv(blocks, steps), warps, stages)
