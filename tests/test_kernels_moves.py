"""Summaries, and pages moving between the tiers, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.cache import tiers
from flexijax.pallas_kernels import dispatch, dispatch_rerank, platform, summaries
from flexijax.pallas_kernels.page_moves import reference
from flexijax.pallas_kernels.page_scores import reference as score_reference
from tests.kernel_cases import numpy_dtype


def pages(rng, *shape, dtype="float32"):
    return rng.normal(size=shape).astype(numpy_dtype(dtype))


def equal(actual, expected) -> bool:
    """The same bits, NaN included."""
    return all(
        np.asarray(a).tobytes() == np.asarray(e).tobytes()
        for a, e in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("page", "width"), [(16, 16), (16, 80), (32, 24)])
def test_moves_equal_their_plan(dtype, page, width):
    rng = np.random.default_rng(0)
    slots = [pages(rng, 2, 3, 4, page, width, dtype=dtype) for _ in "kv"]
    slots[0] = np.moveaxis(slots[0], 4, 2).copy()
    host = [pages(rng, 9, 3, page, width, dtype=dtype) for _ in "kv"]
    host[0][5] = np.nan
    load = rng.integers(-4, 9, size=(2, 3, 4)).astype(np.int32)
    store_block = np.array([[2, -1, 5], [8, 0, -1]], np.int32)
    store_slot = rng.integers(-1, 4, size=(2, 3, 3)).astype(np.int32)
    promoted = jax.jit(dispatch.promote)(*map(jnp.asarray, (*slots, *host, load)))
    assert equal(promoted, reference.promote(*slots, *host, load))
    assert not equal(promoted, slots)
    stored = jax.jit(dispatch.offload)(*map(jnp.asarray, (*host, *slots, store_block, store_slot)))
    assert equal(stored, reference.offload(*host, *slots, store_block, store_slot))
    assert not equal(stored, host)


def test_pages_are_found_in_their_slots():
    """Empty slots, pages in no slot and entries that name none move nothing."""
    rng = np.random.default_rng(0)
    slots = [pages(rng, 2, 3, 5, 16, 24) for _ in "kv"]
    slots[0] = np.moveaxis(slots[0], 4, 2).copy()
    host = [pages(rng, 9, 3, 16, 24) for _ in "kv"]
    slot_page = np.stack([rng.permutation(8)[:5] for _ in range(6)]).reshape(2, 3, 5)
    slot_page[0, :, 2] = -1
    where = [slot_page, np.array([[4, -1, 3], [0, 7, 5]]), np.array([[2, 6, -1], [8, 0, 1]])]
    where = [x.astype(np.int32) for x in where]
    stored = jax.jit(dispatch_rerank.offload_pages)(*map(jnp.asarray, (*host, *slots, *where)))
    expected = reference.offload_pages(*host, *slots, *where)
    assert equal(stored, expected) and not equal(stored, host)
    tier = tiers.HostPages(*jax.device_put(host, platform.sharding("pinned_host")))
    staged = jax.jit(
        functools.partial(tiers.offload_pages, transfer="staged"),
        out_shardings=platform.sharding("pinned_host"),
    )(tier, *slots, *where)
    assert equal((staged.k, staged.v), expected)


def test_an_empty_plan_moves_nothing():
    rng = np.random.default_rng(0)
    slots = [pages(rng, 1, 2, 3, 16, 16) for _ in "kv"]
    slots[0] = np.moveaxis(slots[0], 4, 2).copy()
    host = [np.full((4, 2, 16, 16), np.nan, np.float32) for _ in "kv"]
    none = np.full((1, 2, 3), -1, np.int32)
    assert equal(dispatch.promote(*map(jnp.asarray, (*slots, *host, none))), slots)
    kept = dispatch.offload(*map(jnp.asarray, (*host, *slots, none[:, 0], none)))
    assert equal(kept, host)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("page", "width"), [(16, 16), (8, 80)])
def test_zero_copy_and_staged_agree(dtype, page, width):
    """Both movers, NaN and all bits of it included, on plans with gaps, repeats and nothing."""
    rng = np.random.default_rng(1)
    for share in (0.0, 0.4, 1.0):
        slots = [pages(rng, 2, 3, 5, page, width, dtype=dtype) for _ in "kv"]
        slots[0] = np.moveaxis(slots[0], 4, 2).copy()
        host = [pages(rng, 11, 3, page, width, dtype=dtype) for _ in "kv"]
        host[1][3, 0, 0], slots[1][1, 1, 1] = np.nan, np.nan
        moves = rng.random((2, 3, 5)) < share
        load = np.where(moves, rng.integers(0, 11, moves.shape), -1).astype(np.int32)
        # No block twice: who writes last is not said.
        block = np.where(rng.random((2, 4)) < share, rng.permutation(11)[:8].reshape(2, 4), -1)
        slot = np.where(rng.random((2, 3, 4)) < share, rng.integers(0, 5, (2, 3, 4)), -1)
        found = {}
        for transfer in ("zero_copy", "staged"):
            # Interpret mode knows one memory; staged copies are told where everything lies.
            memory = "pinned_host" if transfer == "staged" else "device"
            tier = tiers.HostPages(*jax.device_put(host, platform.sharding(memory)))
            k, v = jax.device_put(slots, platform.sharding())
            promote = jax.jit(functools.partial(tiers.promote, transfer=transfer))
            offload = jax.jit(
                functools.partial(tiers.offload, transfer=transfer),
                out_shardings=platform.sharding(memory),
            )
            promoted = promote(k, v, tier, load)
            stored = offload(tier, k, v, block.astype(np.int32), slot.astype(np.int32))
            found[transfer] = (*promoted, stored.k, stored.v)
        assert equal(found["zero_copy"], found["staged"])
        assert equal(found["staged"], (*slots, *host)) == (share == 0.0)


@pytest.mark.skipif(platform.is_gpu(), reason="XLA's GPU compiler updates bfloat16 as it is")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_page_costs_a_conversion(dtype):
    """Of a staged move: XLA for a CPU would convert all of both tiers for each page."""

    def shape(*of, memory="device", kind=dtype):
        return jax.ShapeDtypeStruct(of, jnp.dtype(kind), sharding=platform.sharding(memory))

    tier = tiers.HostPages(*(shape(11, 3, 16, 8, memory="pinned_host") for _ in "kv"))
    slots = shape(2, 3, 8, 5, 16), shape(2, 3, 5, 16, 8)
    plan, block = shape(2, 3, 5, kind="int32"), shape(2, 5, kind="int32")
    for move, arguments in (
        (tiers.promote, (*slots, tier, plan)),
        (tiers.offload, (tier, *slots, block, plan)),
    ):
        compiled = jax.jit(functools.partial(move, transfer="staged")).lower(*arguments).compile()
        text = compiled.as_text()
        assert text is not None and "while(" in text and "f32[" not in text


def test_bad_moves_are_named():
    slots, host = jnp.zeros((1, 2, 3, 16, 8)), jnp.zeros((4, 2, 16, 8))
    slots_k = jnp.zeros((1, 2, 8, 3, 16))
    load = jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"H is 8 as in slots_k"):
        dispatch.promote(slots_k, slots, host[..., :4], host, load)
    with pytest.raises(ValueError, match="one dtype"):
        dispatch.promote(slots_k, slots, host.astype(jnp.float16), host, load)
    with pytest.raises(ValueError, match="S is 3 as in slots_v"):
        dispatch.promote(slots_k, slots, host, host, load[..., :2])
    with pytest.raises(ValueError, match="store_slot must be int32"):
        dispatch.offload(host, host, slots_k, slots, load[:, 0], load.astype(jnp.int8))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_summaries_equal_the_oracle(dtype):
    rng = np.random.default_rng(0)
    keys = pages(rng, 5, 2, 16, 80, dtype=dtype)
    counts = np.array([[16, 1], [0, 7], [15, 16], [2, 0], [16, 16]], np.int32)
    keys[np.arange(16) >= counts[..., None]] = np.nan
    found = jax.jit(summaries.summarize)(jnp.asarray(keys), jnp.asarray(counts))
    expected = score_reference.summarize(keys, counts)
    np.testing.assert_array_equal(np.asarray(found).astype(np.float64), expected)
    small = jax.jit(summaries.quantize)(found)
    values, exponents = score_reference.quantize(expected, group=16)
    np.testing.assert_array_equal(small.values, values)
    np.testing.assert_array_equal(small.exponents, exponents)
    np.testing.assert_array_equal(
        summaries.dequantize(small), score_reference.dequantize(values, exponents)
    )


@pytest.mark.parametrize("scale", [1e-30, 1.0, 127.0, 128.0, 1e30])
def test_eight_bits_round_outward(scale):
    rng = np.random.default_rng(0)
    low_high = np.sort(rng.normal(size=(50, 2, 32)) * scale, axis=1).astype(np.float32)
    low_high[0] = 0
    found = np.asarray(summaries.dequantize(summaries.quantize(jnp.asarray(low_high))))
    assert (found[:, 0] <= low_high[:, 0]).all() and (found[:, 1] >= low_high[:, 1]).all()
    step = np.abs(low_high).max(axis=-1, keepdims=True) / 63.5
    assert (np.abs(found - low_high) <= step).all()
