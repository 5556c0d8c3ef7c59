"""A residual sum and its norm against the oracle: odd widths, several parts, both dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch, platform
from flexijax.pallas_kernels.add_norm import reference
from tests.kernel_cases import TOLERANCE, assert_rows_close


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("shape", "parts", "dtype"),
    [((3, 1, 48), 1, "float32"), ((2, 2, 64), 4, "float32"), ((5, 1, 80), 3, "bfloat16")],
    ids=str,
)
def test_sum_and_norm(shape, parts, dtype, implementation):
    rng = np.random.default_rng(parts)
    x = jnp.asarray(3 * rng.normal(size=shape), dtype)
    added = jnp.asarray(rng.normal(size=(parts, *shape)), jnp.float32)
    scale = jnp.asarray(rng.uniform(0.5, 2, shape[-1]), dtype)
    run = functools.partial(dispatch.add_norm, eps=1e-3, implementation=implementation)
    total, normed = jax.jit(run)(x, added, scale)
    assert total.dtype == normed.dtype == x.dtype
    exact = (np.asarray(value, np.float32) for value in (x, added, scale))
    for found, expected in zip((total, normed), reference.add_norm(*exact, eps=1e-3), strict=True):
        assert_rows_close(np.asarray(found, np.float32), expected, TOLERANCE[dtype])
        with pytest.raises(AssertionError):
            assert_rows_close(np.zeros_like(expected), expected, TOLERANCE[dtype])


def test_a_product_comes_in_parts_on_a_gpu_alone():
    assert platform.product_parts(rows=16, inner=4096) == 1
    with platform.compiling_for("gpu"):
        assert platform.product_parts(rows=16, inner=4096) == 8
        assert platform.product_parts(rows=16, inner=1536) == 2
        assert platform.product_parts(rows=16, inner=576) == 1
        assert platform.product_parts(rows=2048, inner=4096) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": jnp.zeros((1, 2, 5))}, r"parts has shape \(1, 2, 5\)"),
        ({"parts": jnp.zeros((0, 2, 4))}, r"parts has shape \(0, 2, 4\)"),
        ({"parts": jnp.zeros((1, 2, 4), jnp.bfloat16)}, "parts must be float32"),
        ({"scale": jnp.zeros(2)}, r"scale has shape \(2,\)"),
        ({"eps": -1.0}, "eps must be finite"),
        ({"implementation": "cuda"}, "implementation must be None or one of"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"x": jnp.zeros((2, 4)), "parts": jnp.zeros((1, 2, 4)), "scale": jnp.zeros(4)}
    with pytest.raises(ValueError, match=message):
        dispatch.add_norm(**{**arguments, "eps": 1e-5, **changes})
