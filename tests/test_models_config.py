"""Reading configs: every family's real config.json, presets, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models import presets
from flexijax.models.config import AttentionShape, RopeScaling
from flexijax.models.decoder import Decoder
from flexijax.models.hf_config import config_from_hf
from flexijax.models.language_model import fingerprint
from flexijax.models.layers import rope_frequencies

pytestmark = pytest.mark.any_jax

# The lines of the published config.json files that say anything about the computation.
HUB = {
    "llama-3.1-8b": dict(
        model_type="llama",
        attention_bias=False,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=131072,
        mlp_bias=False,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_scaling=dict(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        rope_theta=500000.0,
        tie_word_embeddings=False,
        vocab_size=128256,
    ),
    "mistral-7b-v0.2": dict(
        model_type="mistral",
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=14336,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=32000,
    ),
    "mistral-small-24b": dict(
        model_type="mistral",
        head_dim=128,
        hidden_act="silu",
        hidden_size=5120,
        intermediate_size=32768,
        max_position_embeddings=32768,
        num_attention_heads=32,
        num_hidden_layers=40,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=100000000.0,
        sliding_window=None,
        tie_word_embeddings=False,
        vocab_size=131072,
    ),
    "qwen2.5-32b": dict(
        model_type="qwen2",
        hidden_act="silu",
        hidden_size=5120,
        intermediate_size=27648,
        max_position_embeddings=32768,
        max_window_layers=70,
        num_attention_heads=40,
        num_hidden_layers=64,
        num_key_value_heads=8,
        rms_norm_eps=1e-06,
        rope_theta=1000000.0,
        sliding_window=131072,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=152064,
    ),
    "qwen3-8b": dict(
        model_type="qwen3",
        attention_bias=False,
        head_dim=128,
        hidden_act="silu",
        hidden_size=4096,
        intermediate_size=12288,
        max_position_embeddings=40960,
        max_window_layers=36,
        num_attention_heads=32,
        num_hidden_layers=36,
        num_key_value_heads=8,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        tie_word_embeddings=False,
        use_sliding_window=False,
        vocab_size=151936,
    ),
    "smollm2-135m": dict(
        model_type="llama",
        attention_bias=False,
        hidden_act="silu",
        hidden_size=576,
        intermediate_size=1536,
        max_position_embeddings=8192,
        mlp_bias=False,
        num_attention_heads=9,
        num_hidden_layers=30,
        num_key_value_heads=3,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        vocab_size=49152,
    ),
}
PARAMETERS = {  # in billions, as the models' cards say
    "llama-3.1-8b": 8.03,
    "mistral-7b-v0.2": 7.24,
    "mistral-small-24b": 23.6,
    "qwen2.5-32b": 32.8,
    "qwen3-8b": 8.19,
    "smollm2-135m": 0.1345,
}


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_preset_is_the_published_config(name):
    config = presets.config(name)
    assert config_from_hf(HUB[name]) == config
    leaves = jax.tree.leaves(presets.abstract_params(name, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    count = sum(leaf.size for leaf in leaves)
    assert count / 1e9 == pytest.approx(PARAMETERS[name], rel=0.003)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"name='gpt-2'.*smollm2-135m"):
        presets.config("gpt-2")


def test_random_params_are_reproducible():
    config = dataclasses.replace(presets.config("smollm2-135m"), num_layers=1, vocab_size=10)
    one, two = (Decoder(config).init(jax.random.key(3), dtype=jnp.float32) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    other = Decoder(config).init(jax.random.key(4), dtype=jnp.float32)
    assert not np.array_equal(one["embed"]["embedding"], other["embed"]["embedding"])


def test_transformers_5_keeps_rope_in_one_place():
    old = HUB["llama-3.1-8b"]
    rope = {"rope_theta": old["rope_theta"], **old["rope_scaling"]}
    new = {k: v for k, v in old.items() if not k.startswith("rope_")} | {"rope_parameters": rope}
    assert config_from_hf(new) == presets.config("llama-3.1-8b")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-3.1-8b", dict(model_type="gpt2"), "model_type='gpt2'"),
        ("llama-3.1-8b", dict(attention_bias=True), "attention_bias"),
        ("llama-3.1-8b", dict(mlp_bias=True), "mlp_bias"),
        ("llama-3.1-8b", dict(hidden_act="gelu"), "hidden_act='gelu'"),
        ("llama-3.1-8b", dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "'yarn'"),
        ("llama-3.1-8b", dict(rope_scaling=dict(type="longrope", factor=4.0)), "'longrope'"),
        ("llama-3.1-8b", dict(rope_scaling=dict(type="linear")), "no factor"),
        ("llama-3.1-8b", dict(rope_scaling=dict(type="linear", factor=0.5)), "factor=0.5"),
        ("llama-3.1-8b", dict(rope_scaling=dict(type="llama3", factor=8.0)), "low_freq_factor"),
        ("llama-3.1-8b", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("llama-3.1-8b", dict(quantization_config=dict(quant_method="gptq")), "'gptq'"),
        (
            "llama-3.1-8b",
            dict(hidden_size=None, vocab_size=None),
            "vocab_size is null; hidden",
        ),
        ("llama-3.1-8b", dict(num_key_value_heads=5), "multiple of num_kv_heads=5"),
        ("llama-3.1-8b", dict(head_dim=63), "head_dim=63"),
        ("llama-3.1-8b", dict(sliding_window=64), "sliding_window=64.*max_context=64"),
        ("mistral-7b-v0.2", dict(sliding_window=4096), "sliding_window=4096.*max_context=4096"),
        (
            "qwen2.5-32b",
            dict(use_sliding_window=True, sliding_window=4096, max_window_layers=10),
            "sliding_window=4096",
        ),
        (
            "qwen3-8b",
            dict(
                use_sliding_window=True, sliding_window=64, layer_types=["sliding_attention"] * 36
            ),
            "sliding_window=64",
        ),
    ],
)
def test_what_the_decoder_does_not_do_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(HUB[name] | change)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-3.1-8b", dict(sliding_window=131072)),
        ("qwen2.5-32b", dict(use_sliding_window=True, sliding_window=4096)),  # no layer has it
        (
            "qwen3-8b",
            dict(use_sliding_window=True, sliding_window=64, layer_types=["full_attention"] * 36),
        ),
        ("mistral-7b-v0.2", dict(sliding_window=32768)),
    ],
)
def test_a_window_that_no_layer_feels_changes_nothing(name, change):
    assert config_from_hf(HUB[name] | change) == presets.config(name)


def test_a_shorter_context_makes_a_window_exact():
    windowed = HUB["mistral-7b-v0.2"] | {"sliding_window": 4096}
    assert config_from_hf(windowed, max_context=4096).max_context == 4096
    with pytest.raises(ValueError, match="max_context=40000: must be from 1 to the model's 32768"):
        config_from_hf(windowed, max_context=40000)


def test_fingerprints_tell_architectures_apart():
    prints = [fingerprint(presets.config(name)) for name in presets.NAMES]
    assert len(set(prints)) == len(prints)
    llama = presets.config("llama-3.1-8b")
    assert fingerprint(llama.with_context(1024)) == fingerprint(llama)


def test_llama3_scaling_leaves_short_waves_and_divides_long_ones():
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    plain = rope_frequencies(128, 500000.0, None)
    scaled = rope_frequencies(128, 500000.0, scaling)
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_layers=0), "num_layers=0"),
        (dict(num_heads=7), "num_heads=7"),
        (dict(scale=float("nan")), "scale=nan"),
    ],
)
def test_an_attention_shape_checks_itself(change, message):
    shape = AttentionShape(num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, scale=0.125)
    assert shape.group_size == 4
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(shape, **change)
