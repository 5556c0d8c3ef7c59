"""Coded pages: format, bounds, extremes, and attention over them, against float64 NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.page_codes import reference
from flexijax.pallas_kernels.page_codes import xla as codes
from flexijax.pallas_kernels.sparse_decode import reference as attention
from flexijax.pallas_kernels.stores import CodedStore, SlotStore
from flexijax.policies.codec import CODECS, Codec, rotate
from flexijax.policies.page_score import PageShape

BITS = pytest.mark.parametrize("bits", codes.BITS)


def pages_of(*lead, page=16, width=64, seed=0):
    """Keys with outlier channels and means far from zero, and values: float32[..., page, H]."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(0, 2, size=(*lead, 1, width)))
    k = rng.normal(size=(*lead, page, width)) * spread + 5 * rng.normal(size=(*lead, 1, width))
    return k.astype(np.float32), rng.normal(size=(*lead, page, width)).astype(np.float32)


encode = jax.jit(codes.encode, static_argnames="bits")
decode = jax.jit(codes.decode, static_argnames=("page", "width", "bits"))


def decoded(k, v, bits):
    page, width = k.shape[-2:]
    words = encode(jnp.asarray(k), jnp.asarray(v), bits=bits)
    return (np.asarray(x) for x in decode(words, page=page, width=width, bits=bits))


@BITS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("page", "width"), [(16, 64), (4, 8), (1, 80)])
def test_words_are_the_oracles(bits, dtype, page, width):
    k, v = (jnp.asarray(x, dtype) for x in pages_of(page=page, width=width))
    k = k.at[:, 0].set(3.0).at[:, 1].set(0.0).at[:, 2].set(-1e4)  # constant channels
    words = encode(k, v, bits=bits)
    assert words.dtype == jnp.uint32
    size, fifth = page * width * bits // 32, -(-page * width // 32) if bits == 4 else 0
    assert words.shape == (2 * size + fifth + width + page,)  # the closed form
    found = reference.words_of(np.asarray(k, np.float64), np.asarray(v, np.float64), bits=bits)
    ends = np.cumsum([size, fifth, width, size])
    got, wanted = (np.split(np.asarray(x), ends) for x in (words, found))
    for at in (2, 4):  # ranges
        np.testing.assert_array_equal(got[at], wanted[at])
    for level, expected in zip(
        *(levels_in(x, page, width, bits) for x in (got, wanted)), strict=True
    ):
        # In the middle between two levels float32 may come to either.
        assert np.abs(level - expected).max() <= 1 and (level != expected).mean() < 0.1


def levels_in(parts, page, width, bits):
    """Codes int[page, H] of keys and of values, of the parts of a page's words."""

    def of(words, bits, *shape):
        shift = bits * np.arange(32 // bits, dtype=np.uint32)[:, None]
        return (words[..., None, :] >> shift & (2**bits - 1)).astype(int).reshape(*shape, -1)

    low, fifth, _, values, _ = parts
    keys, values = (of(x.reshape(page, -1), bits, page) for x in (low, values))
    if bits == 4:
        keys = keys + 16 * of(fifth, 1)[: page * width].reshape(page, width)
        assert page == 1 or keys.max() == 31, "the fifth bits are there"
    return keys, values


@BITS
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e30])
def test_no_element_is_off_by_more_than_half_a_step(bits, scale):
    k, v = (x * np.float32(scale) for x in pages_of(3, 2))
    both = zip((k, v), decoded(k, v, bits), (-2, -1), (codes.key_bits(bits), bits), strict=True)
    for x, made, axis, wide in both:
        expected, step = reference.approximated(x, axis=axis, bits=wide)
        same = np.isclose(made, expected, rtol=1e-6, atol=1e-6 * step.min())
        assert same.mean() > 0.99, "but for the middle between two levels, it is the oracle's"
        # What a code stands for is rounded once.
        assert (np.abs(made - x) <= step / 2 + 2e-7 * np.abs(x)).all()
        # The bound says something: no wider than the range, its ends rounded to 8 bits.
        ends = x.max(axis, keepdims=True) - x.min(axis, keepdims=True)
        most = (ends + 2**-7 * np.abs(x.min(axis, keepdims=True))) / (2**wide - 1)
        assert (step <= 1.01 * most).all()
        assert np.abs(made - x).max() > 0, "nothing was coded"


def test_four_bits_are_coarser_than_eight_and_zeros_would_fail():
    k, v = pages_of(2)
    errors = [
        [np.abs(x - y).mean() for x, y in zip(decoded(k, v, bits), (k, v), strict=True)]
        for bits in (4, 8)
    ]
    for mine, finer, steps in zip(*errors, (255 / 31, 255 / 15), strict=True):
        assert mine / finer == pytest.approx(steps, rel=0.2)
    assert errors[0][0] < 0.1 * np.abs(k).mean()


@BITS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_never_one_afterwards(bits, bad):
    k, v = pages_of()
    k[3, 5] = v[7, 2] = bad
    made_k, made_v = decoded(k, v, bits)
    assert not np.isfinite(made_k[:, 5]).any() and not np.isfinite(made_v[7]).any()
    others = np.isfinite(np.delete(made_k, 5, axis=1)), np.isfinite(np.delete(made_v, 7, axis=0))
    assert all(of.all() for of in others)


def test_a_range_that_a_device_might_flush_to_zero_is_constant():
    k, v = pages_of()
    k[:, 4] = np.linspace(0, 1e-37, 16)
    made = next(decoded(k, v, 4))
    assert (made[:, 4] == 0).all()


def test_levels_beyond_float16_are_its_end_and_infinities_stay():
    x = jnp.asarray([70000.0, -70000.0, 3.0, jnp.inf, jnp.nan])
    made = np.asarray(codes.narrowed(x, "float16"), np.float32)
    np.testing.assert_array_equal(made, [65504, -65504, 3, np.inf, np.nan])
    k = jnp.full((16, 8), 65504.0, jnp.float16).at[0].set(-65504.0)
    page = PageShape(16, 8, "float16")
    assert np.isfinite(Codec(4).decode(Codec(4).encode(k, k), page)[0]).all()


@pytest.mark.parametrize("width", [8, 64, 80, 96])
def test_values_are_rotated_by_an_orthogonal_matrix_that_is_its_own_inverse(width):
    _, v = pages_of(width=width)
    matrix = reference.hadamard(width)
    np.testing.assert_allclose(matrix @ matrix, np.eye(width), atol=1e-12)
    made = rotate(jnp.asarray(v))
    np.testing.assert_allclose(made, v @ matrix, atol=1e-5)
    np.testing.assert_allclose(rotate(made), v, atol=1e-5)


def test_a_codec_is_a_value_that_checks_itself():
    assert {name: codec.name for name, codec in CODECS.items()} == {"int8": "int8", "int4": "int4"}
    assert dataclasses.replace(CODECS["int4"]) == Codec(4) != Codec(8)
    with pytest.raises(ValueError, match=r"bits=3 of Codec must be one of \(4, 8\)"):
        Codec(3)
    with pytest.raises(ValueError, match="device_codec='int4' needs a head_dim that is a multiple"):
        Codec(4).check(PageShape(16, 20, "float32"), "device_codec")
    Codec(8).check(PageShape(16, 20, "float32"), "device_codec")
    # Llama-3.1-8B: 128 channels, 16 tokens.
    page = PageShape(16, 128, "bfloat16")
    assert [Codec(bits).page_bytes(page) for bits in (4, 8)] == [2880, 4672]


@BITS
@pytest.mark.parametrize("held", [(0, 33), (31, 40), (-1, 5)], ids=str)
def test_attention_over_coded_pages_and_a_tail(bits, held):
    """What must not be read is poisoned: other blocks' ranges, and the tail behind the token."""
    batch, heads, group, page, width, tail, blocks = 2, 2, 3, 4, 16, 3, 24
    rng = np.random.default_rng(1)
    k, v = pages_of(blocks, heads, page=page, width=width)
    table = rng.permutation(blocks).reshape(batch, -1).astype(np.int32)  # 12 pages each
    rows = np.maximum(held, 0)
    coded = np.maximum(rows - 5, 0) // page * page  # the tail holds what came since
    pool = np.array(encode(jnp.asarray(k), jnp.asarray(v), bits=bits))
    for row in range(batch):
        pool[table[row, coded[row] // page :]] = 0x7FC07FC0  # every range NaN
    k_tail = np.full((batch, heads, width, tail, page), np.nan, np.float32)
    v_tail = np.full((batch, heads, tail, page, width), np.nan, np.float32)
    slot_page = np.zeros((batch, heads, tail), np.int32)
    for row in range(batch):
        for slot in range(tail):
            number = coded[row] // page + (slot - coded[row] // page) % tail
            slot_page[row, :, slot] = number
            begun = max(0, min(page, rows[row] - number * page))
            block = table[row, min(number, 11)]
            k_tail[row, :, :, slot, :begun] = k[block, :, :begun].swapaxes(-1, -2)
            v_tail[row, :, slot, :begun] = v[block, :, :begun]
    attended = np.stack([np.arange(12)] * heads)[None].repeat(batch, 0).astype(np.int32)
    attended[:, 0, 1] = attended[:, 1, 2] = -1
    attended[attended * page > rows[:, None, None]] = -1
    q = rng.normal(size=(batch, heads, group, width)).astype(np.float32)
    new_k, new_v = (rng.normal(size=(batch, heads, width)).astype(np.float32) for _ in "kv")
    held = jnp.asarray(held, jnp.int32)
    store = CodedStore(
        jnp.asarray(pool),
        SlotStore(*map(jnp.asarray, (k_tail, v_tail, slot_page)), held, (0, 1)),
        jnp.asarray(attended),
        jnp.asarray(table),
        jnp.asarray(coded, jnp.int32),
        (0, 1),
        bits,
    )
    args = (jnp.asarray(q), jnp.asarray(new_k), jnp.asarray(new_v), (store,))
    out = np.asarray(jax.jit(lambda *of: dispatch.decode_attention(*of, scale=0.25)[0])(*args))
    stands = [
        np.asarray(x) for x in codes.decode(jnp.asarray(pool), page=page, width=width, bits=bits)
    ]
    for row in range(batch):
        for head in range(heads):
            if held[row] < 0:
                assert (out[row] == 0).all()
                continue
            read = [table[row, at] for at in attended[row, head] if 0 <= at * page < coded[row]]
            parts = [[x[block, head] for block in read] for x in stands]
            since = range(coded[row], int(held[row]))
            for of, exact, new in zip(parts, (k, v), (new_k, new_v), strict=True):
                of += [exact[table[row, at // page], head, at % page][None] for at in since]
                of.append(new[row, head][None])
            found, _ = attention.attend(q[row, head], *map(np.concatenate, parts), scale=0.25)
            np.testing.assert_allclose(out[row, head], found, atol=2e-5)
            assert np.abs(found).max() > 0.1, "zeros would pass"


def test_kernels_of_a_gpu_are_refused():
    tail = SlotStore(
        jnp.zeros((1, 1, 8, 2, 4)), jnp.zeros((1, 1, 2, 4, 8)), None, jnp.zeros(1, jnp.int32), (0,)
    )
    words, table = jnp.zeros((3, 1, codes.page_words(4, 8, 4)), jnp.uint32), jnp.zeros((1, 3), int)
    pages, table = jnp.zeros((1, 1, 2), jnp.int32), table.astype(jnp.int32)
    store = CodedStore(words, tail, pages, table, jnp.zeros(1, jnp.int32), (0,), 4)
    q, new = jnp.zeros((1, 1, 2, 8)), jnp.zeros((1, 1, 8))
    with pytest.raises(ValueError, match="coded pages, are for implementation='xla'"):
        dispatch.decode_attention(q, new, new, (store,), scale=1.0, implementation="pallas")
    wrong = dataclasses.replace(store, codes=words[..., :-1])
    with pytest.raises(ValueError, match="codes"):
        dispatch.decode_attention(q, new, new, (wrong,), scale=1.0)
