"""The parts of a layer against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models import layers
from flexijax.models.config import AttentionShape
from flexijax.models.dense import dense_attend
from tests.tiny_models import tiny_config


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("channels", [192, 384, 100])
def test_a_projection_is_the_product_at_any_count_of_rows(rows, channels):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((rows, 1, 64)), rng.standard_normal((channels, 64))
    ours = layers.project(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32))
    expected = x @ kernel.T
    assert ours.shape == (rows, 1, channels)
    error = np.linalg.norm(ours - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("channels", [576, 100])
def test_a_row_of_a_projection_has_the_same_bits_beside_one_other_and_seven(channels, dtype):
    """Or what a request says would depend on who shares its batch."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 1, 576)), dtype)
    kernel = jnp.asarray(rng.standard_normal((channels, 576)), dtype)
    of_eight = np.asarray(jax.jit(layers.project)(x, kernel))
    for rows in range(2, 8):
        made = np.asarray(jax.jit(layers.project)(x[:rows], kernel))
        np.testing.assert_array_equal(made, of_eight[:rows])


def test_a_projection_accumulates_in_float32():
    # 4096 ones: in bfloat16 the sum would stop growing at 256.
    x, kernel = jnp.ones((2, 1, 4096), jnp.bfloat16), jnp.ones((192, 4096), jnp.bfloat16)
    np.testing.assert_array_equal(layers.project(x, kernel), np.full((2, 1, 192), 4096.0))


def test_rms_norm_divides_by_the_root_mean_square():
    x = np.array([[3.0, -4.0], [0.0, 0.0]])
    scale = np.array([2.0, 0.5])
    ours = layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), eps=1e-6)
    root = np.sqrt((9 + 16) / 2)
    np.testing.assert_allclose(ours, [[6 / root, -2 / root], [0, 0]], rtol=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    config = tiny_config("llama")
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, config.head_dim)).astype(np.float32)

    def score(query_at: int, key_at: int) -> float:
        rotated = [
            layers.rotate(jnp.asarray(x), *layers.rope_tables(jnp.full((1, 1), at), config))
            for x, at in ((q, query_at), (k, key_at))
        ]
        return float(jnp.sum(rotated[0] * rotated[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(5, 5) == pytest.approx(float((q * k).sum()), rel=1e-5)
    assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-2)


def test_dense_attention_is_the_causal_softmax():
    shape = AttentionShape(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, scale=0.3)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, n, 8)) for n in (4, 2, 2))
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    out, state = jax.jit(lambda q, k, v: dense_attend(shape)(0, q, k, v, None))(*arrays)
    assert state is None
    for b in range(2):
        for t in range(5):
            for n in range(4):
                logits = 0.3 * k[b, : t + 1, n // 2] @ q[b, t, n]
                weights = np.exp(logits) / np.exp(logits).sum()
                expected = weights @ v[b, : t + 1, n // 2]
                error = np.linalg.norm(out[b, t, n] - expected) / np.linalg.norm(expected)
                assert error < 1e-5
