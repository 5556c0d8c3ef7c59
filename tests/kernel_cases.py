"""One list of inputs for every implementation of a kernel, poisoned where it must not read."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

TOKEN_LENGTHS = (1, 15, 16, 17, 63, 64, 65)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


@dataclass(frozen=True)
class DecodeCase:
    """q attends `lengths[b]` tokens of request b; a length in `dead` (b, h) reads nothing."""

    name: str
    lengths: tuple[int, ...]
    dtype: str = "float32"
    heads: int = 2
    group: int = 3
    width: int = 16
    page: int = 16
    dead: tuple[tuple[int, int], ...] = ()
    repeat: bool = False

    def __str__(self) -> str:
        return self.name


DECODE_CASES = (
    DecodeCase("tokens", TOKEN_LENGTHS),
    DecodeCase("pages", tuple(16 * n for n in TOKEN_LENGTHS), heads=1),
    DecodeCase("long-page-64", tuple(64 * n - 1 for n in (1, 17, 65)), page=64, heads=1, group=1),
    DecodeCase("empty-request", (0, 40, 0)),
    DecodeCase("masked-heads", (50, 33), heads=3, dead=((0, 1), (1, 0), (1, 2))),
    DecodeCase("duplicate-pages", (90, 70), repeat=True),
    DecodeCase("one-query-head", (65,), group=1, width=64),
    DecodeCase("more-rows-than-16", (37,), group=17, width=32),
    DecodeCase("width-80", (65, 17), width=80),
    DecodeCase("bf16-width-128", (65, 130), "bfloat16", group=4, width=128, page=32),
    DecodeCase("bf16-width-96", (65,), "bfloat16", group=8, width=96),
    DecodeCase("f16-width-256", (65, 64), "float16", group=2, width=256, page=64),
)


@dataclass(frozen=True)
class ScoreCase:
    """Pages of requests with `lengths` tokens, scored from 16-bit (or wider) or 8-bit summaries."""

    name: str
    lengths: tuple[int, ...]
    dtype: str = "float32"
    quantized: bool = False
    heads: int = 2
    group: int = 3
    width: int = 32
    page: int = 16

    def __str__(self) -> str:
        return self.name


SCORE_CASES = (
    ScoreCase("tokens", TOKEN_LENGTHS),
    ScoreCase("pages", tuple(16 * n for n in TOKEN_LENGTHS), heads=1),
    ScoreCase("empty-request", (0, 33), group=1),
    ScoreCase("more-rows-than-16", (33,), group=17),
    ScoreCase("width-80-page-32", (33, 65), width=80, page=32),
    ScoreCase("bf16-width-128", (65, 1), "bfloat16", group=4, width=128),
    ScoreCase("8-bit", TOKEN_LENGTHS, quantized=True, width=64),
    ScoreCase("8-bit-pages", tuple(16 * n for n in TOKEN_LENGTHS), quantized=True, heads=1),
    ScoreCase("8-bit-width-80", (40,), "bfloat16", quantized=True, width=80, group=8),
    ScoreCase("8-bit-f16", (65,), "float16", quantized=True, width=128),
)


@dataclass(frozen=True)
class SketchCase:
    """Full pages of requests with `lengths` tokens, scored from codes of `bits` bits."""

    name: str
    lengths: tuple[int, ...]
    bits: int = 2
    heads: int = 2
    group: int = 3
    width: int = 64
    page: int = 16

    def __str__(self) -> str:
        return self.name


SKETCH_CASES = (
    SketchCase("tokens", TOKEN_LENGTHS),
    SketchCase("pages", tuple(16 * n for n in TOKEN_LENGTHS), heads=1),
    SketchCase("1-bit", (0, 47), bits=1),
    SketchCase("4-bit", (95, 16), bits=4, width=32),
    SketchCase("one-query-head-width-128", (65,), group=1, width=128),
    SketchCase("more-rows-than-16", (33,), group=17, heads=1, width=32),
    SketchCase("width-80-page-32", (64, 65), width=80, page=32),
    SketchCase("width-8-page-4-1-bit", (21, 3), bits=1, width=8, page=4),
    SketchCase("page-64-4-bit", (129,), bits=4, heads=1, page=64),
)


def numpy_dtype(name: str) -> np.dtype:
    """NumPy's dtype of that name, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def decode_inputs(case: DecodeCase) -> dict[str, np.ndarray]:
    """Arguments of `paged_decode`: a pool of NaN in which only what must be read is a number."""
    rng = np.random.default_rng(len(case.name))
    batch, dtype = len(case.lengths), numpy_dtype(case.dtype)
    pages = max(1, *(-(-length // case.page) for length in case.lengths)) + 1
    blocks = batch * pages + 3
    ids = rng.permutation(blocks - 1)[: batch * pages].reshape(batch, 1, pages) + 1
    ids = np.broadcast_to(ids, (batch, case.heads, pages)).astype(np.int32).copy()
    counts = np.zeros((batch, case.heads, pages), np.int32)
    for b, length in enumerate(case.lengths):
        whole, rest = divmod(length, case.page)
        for h in range(case.heads):
            if (b, h) in case.dead:
                continue
            counts[b, h, :whole] = case.page
            if rest:
                counts[b, h, whole] = rest
            # Another order for every head, and pages that nobody reads in between.
            order = rng.permutation(pages)
            ids[b, h], counts[b, h] = ids[b, h, order], counts[b, h, order]
            if case.repeat:
                ids[b, h, 0], counts[b, h, 0] = ids[b, h, 1], max(1, counts[b, h, 1] - 3)
    ids = np.where((counts == 0) & (rng.random(counts.shape) < 0.5), -1, ids)
    shape = (blocks, case.heads, case.page, case.width)
    k, v = np.full(shape, np.nan, dtype), np.full(shape, np.nan, dtype)
    for b, h, n in np.argwhere(counts > 0):
        valid = (ids[b, h, n], h, slice(counts[b, h, n]))
        size = (counts[b, h, n], case.width)
        # Large enough that a few keys win: attention that ignored its weights would be seen.
        k[valid], v[valid] = 2 * rng.normal(size=size), rng.normal(size=size)
    q = rng.normal(size=(batch, case.heads, case.group, case.width)).astype(dtype)
    return {"q": q, "k_pages": k, "v_pages": v, "block_ids": ids, "token_counts": counts}


def slot_inputs(case: DecodeCase) -> dict[str, np.ndarray]:
    """The same keys and values as `decode_inputs`, as arguments of `slot_decode`."""
    paged = decode_inputs(case)
    ids = np.maximum(paged["block_ids"], 0)
    heads = np.arange(case.heads)[None, :, None]
    return {
        "q": paged["q"],
        "k_slots": np.moveaxis(paged["k_pages"][ids, heads], 4, 2),
        "v_slots": paged["v_pages"][ids, heads],
        "token_counts": paged["token_counts"],
    }


def score_inputs(case: ScoreCase) -> dict[str, np.ndarray]:
    """q, block_table, lengths, and `low_high` [blocks, K, 2, H] with NaN in unread pages."""
    rng = np.random.default_rng(len(case.name))
    batch, dtype = len(case.lengths), numpy_dtype(case.dtype)
    used = [-(-length // case.page) for length in case.lengths]
    pages = max(used) + 1
    blocks = batch * pages + 2
    table = rng.permutation(blocks)[: batch * pages].reshape(batch, pages).astype(np.int32)
    low_high = np.full((blocks, case.heads, 2, case.width), np.nan, dtype)
    for b, count in enumerate(used):
        for block in table[b, :count]:
            keys = rng.normal(size=(case.heads, case.page, case.width)) * 3
            low_high[block] = np.stack([keys.min(axis=1), keys.max(axis=1)], axis=1)
    q = rng.normal(size=(batch, case.heads, case.group, case.width)).astype(dtype)
    lengths = np.array(case.lengths, np.int32)
    return {"q": q, "low_high": low_high, "block_table": table, "lengths": lengths}


def sketch_inputs(case: SketchCase) -> dict[str, np.ndarray]:
    """Arguments of `sketch_scores`; what belongs to no full page is garbage, or NaN."""
    rng = np.random.default_rng(len(case.name))
    batch = len(case.lengths)
    full = [length // case.page for length in case.lengths]
    pages = max(full) + 2
    blocks = batch * pages + 2
    table = rng.permutation(blocks)[: batch * pages].reshape(batch, pages).astype(np.int32)
    shape = (blocks, case.heads, case.bits, -(-case.width // 32), case.page)
    heads = (batch, case.heads, case.group)
    inputs = {
        "weights": rng.integers(-31, 32, (*heads, case.width)).astype(np.int8),
        "offset": rng.normal(size=heads).astype(np.float32),
        # Large enough that a few tokens win.
        "unit": (rng.uniform(0.5, 2, heads) / (20 * case.width**0.5 * 2**case.bits)),
        "codes": rng.integers(0, 2**32, shape, dtype=np.uint32),
        "block_table": table,
        "lengths": np.array(case.lengths, np.int32),
    }
    inputs["unit"] = inputs["unit"].astype(np.float32)
    for b, count in enumerate(full):
        table[b, count:] = 2**30
        if not count:
            inputs["offset"][b] = inputs["unit"][b] = np.nan
    return inputs


def assert_rows_close(actual, expected: np.ndarray, tolerance: float) -> None:
    """Every row (last axis) within `tolerance` of its own norm; zero rows must be zero."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected, axis=-1)
    assert (error <= tolerance * np.linalg.norm(expected, axis=-1)).all(), error.max()


def assert_numbers_close(actual, expected: np.ndarray, tolerance: float) -> None:
    """Every number within `tolerance` of max(1, |expected|), and -inf exactly where expected."""
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    assert (actual[~finite] == expected[~finite]).all()
    error = np.abs(actual[finite] - expected[finite])
    assert (error <= tolerance * np.maximum(1, np.abs(expected[finite]))).all(), error.max()
