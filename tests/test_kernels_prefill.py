"""The layout and the offset of the cuDNN path, computed by XLA, against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import prefill_cudnn, reference
from tests.kernel_cases import assert_rows_close


@pytest.mark.parametrize("start", [0, 1, 7, 16])
def test_causal_with_an_offset(start):
    rng = np.random.default_rng(0)
    tokens, heads, group, width, size = 8, 2, 3, 16, 24
    q = rng.normal(size=(tokens, heads, group, width)).astype(np.float32)
    k = rng.normal(size=(heads, width, size)).astype(np.float32)
    v = rng.normal(size=(heads, size, width)).astype(np.float32)
    k[:, :, start + tokens :], v[:, start + tokens :] = np.nan, np.nan
    out = prefill_cudnn.prefill_attention(
        *map(jnp.asarray, (q, k, v)), jnp.int32(start), scale=0.25, backend="xla"
    )
    expected = np.stack(
        [
            [
                reference.attend(
                    q[t, h].astype(float),
                    k[h, :, : start + t + 1].T.astype(float),
                    v[h, : start + t + 1].astype(float),
                    scale=0.25,
                )[0]
                for h in range(heads)
            ]
            for t in range(tokens)
        ]
    )
    assert_rows_close(out, expected, 1e-5)
    with pytest.raises(AssertionError):
        assert_rows_close(np.zeros_like(expected), expected, 1e-5)


def test_it_is_not_chosen_without_a_gpu():
    assert not prefill_cudnn.fits(jnp.zeros((1, 1, 1, 64), jnp.bfloat16))
