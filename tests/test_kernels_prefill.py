"""Prefill attention: XLA's path, and cuDNN's layout and offset by XLA, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch, platform
from flexijax.pallas_kernels.prefill import cudnn, reference
from tests.kernel_cases import assert_numbers_close, assert_rows_close

SCALE = 0.25


def inputs(*, tokens, start, size, beyond, heads=2, group=3, width=16):
    """q, k, v, start; keys and values beyond the chunk are all `beyond`."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(tokens, heads, group, width)).astype(np.float32)
    k = 2 * rng.normal(size=(heads, width, size)).astype(np.float32)
    v = rng.normal(size=(heads, size, width)).astype(np.float32)
    k[:, :, start + tokens :], v[:, start + tokens :] = beyond, beyond
    return *map(jnp.asarray, (q, k, v)), jnp.int32(start)


@pytest.mark.parametrize("start", [0, 1, 7, 16])
def test_causal_with_an_offset(start):
    arguments = inputs(tokens=8, start=start, size=24, beyond=np.nan)
    out = cudnn.prefill_attention(*arguments, scale=SCALE, backend="xla")
    expected, _ = reference.prefill_attention(*arguments[:3], start, scale=SCALE)
    assert_rows_close(out, expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_rows_close(np.zeros_like(expected), expected, 1e-5)


@pytest.mark.parametrize(
    ("tokens", "start", "size"),
    [
        *((1, 0, 16), (8, 7, 24), (32, 32, 64), (64, 192, 256), (65, 3, 100), (512, 512, 2048)),
        (64, 1344, 2048),  # a wide block, steps before the diagonal, and one on it
        (520, 520, 2080),  # two tiles, blocks that are no powers of two
    ],
    ids=str,
)
def test_xla_with_its_log_sum_exp(tokens, start, size):
    """Blocks and steps before the chunk, on the diagonal and beyond it, which is garbage."""
    arguments = inputs(tokens=tokens, start=start, size=size, beyond=100.0, heads=1 + (size < 99))
    run = functools.partial(dispatch.prefill_attention, scale=SCALE, implementation="xla")
    out, lse = jax.jit(functools.partial(run, return_lse=True))(*arguments)
    expected, expected_lse = reference.prefill_attention(*arguments[:3], start, scale=SCALE)
    assert out.dtype == lse.dtype == jnp.float32
    assert_rows_close(out, expected, 1e-5)
    assert_numbers_close(lse, expected_lse, 1e-5)
    np.testing.assert_array_equal(jax.jit(run)(*arguments), out)
    with pytest.raises(AssertionError):
        assert_rows_close(np.zeros_like(expected), expected, 1e-5)


def test_reference_by_hand():
    """The first query sees one key; the second two, of logits 0 and log 3."""
    q = np.array([[[[1.0, 0.0]]], [[[1.0, 0.0]]]])
    k, v = np.array([[[0.0, np.log(3)], [5.0, 7.0]]]), np.array([[[4.0, 0.0], [0.0, 8.0]]])
    out, lse = reference.prefill_attention(q, k, v, 0, scale=1.0)
    np.testing.assert_allclose(out[:, 0, 0], [[4.0, 0.0], [1.0, 6.0]])
    np.testing.assert_allclose(lse[:, 0, 0], [0.0, np.log(4)])


def test_cudnn_is_not_chosen_without_a_gpu():
    assert not cudnn.fits(jnp.zeros((1, 1, 1, 64), jnp.bfloat16))


@pytest.mark.parametrize("implementation", [None, "pallas", "triton", "xla"])
@pytest.mark.parametrize("installed", [True, False])
def test_who_computes_prefill_on_a_gpu(implementation, installed, monkeypatch):
    """The rule of `prefill_attention`: all names but "xla" are cuDNN where it fits, else XLA."""
    present = {"nvidia.cudnn": installed, "jax_triton": True}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: present[name] or None)
    # jax refuses even to trace cuDNN's attention where there is no cuDNN.
    traced = []
    monkeypatch.setattr(cudnn, "prefill_attention", lambda q, *_, **__: traced.append(q) or q)
    q, k, v, start = inputs(tokens=8, start=0, size=16, beyond=0.0)
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    for return_lse in (False, True):
        traced.clear()
        run = functools.partial(
            dispatch.prefill_attention,
            scale=SCALE,
            implementation=implementation,
            return_lse=return_lse,
        )
        with platform.compiling_for("gpu"):
            jax.eval_shape(run, q, k, v, start)
        assert bool(traced) == (installed and implementation != "xla" and not return_lse)


def test_bad_arguments_are_named():
    q, k, v, start = inputs(tokens=8, start=0, size=16, beyond=0.0)
    run = functools.partial(dispatch.prefill_attention, scale=SCALE)
    with pytest.raises(ValueError, match=r"v\[K, S, H\] has shape .* S is 16 as in k"):
        run(q, k, v[:, :8], start)
    with pytest.raises(ValueError, match="one dtype"):
        run(q, k.astype(jnp.float16), v, start)
    with pytest.raises(ValueError, match="scale must be positive and finite, got 0"):
        run(q, k, v, start, scale=0)
    with pytest.raises(ValueError, match=r"implementation must be None or one of .*'cudnn'"):
        run(q, k, v, start, implementation="cudnn")
