"""Our decoder against transformers on the same weights, family by family."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.models.dense import dense_attend
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from tests import tiny_models

torch = pytest.importorskip("torch", reason="parity needs the torch extra")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing transformers warns of is not ours
    transformers = pytest.importorskip("transformers", reason="parity needs the torch extra")

_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


def their_model(config: ModelConfig):
    """A random transformers model of the same shape; every weight differs from its default."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position,
            }
    config_name, model_name = _CLASSES[config.family]
    theirs = getattr(transformers, config_name)(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        rope_parameters=rope,
        sliding_window=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(theirs).eval()
    model.generation_config.eos_token_id = None  # nothing may be kept from being chosen
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            # Norm scales around one, everything else large enough that no part is negligible.
            vector = parameter.ndim == 1
            parameter.copy_(1 + 0.2 * noise if vector else noise * parameter.shape[-1] ** -0.5)
    return model


def our_logits(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] by dense attention."""

    @jax.jit
    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        attend = dense_attend(lm.attention)
        x, _ = lm.decoder.hidden(params, tokens, positions, attend, None)
        return lm.decoder.logits(params, x)

    return np.asarray(run(lm.params, jnp.asarray(tokens)))


def row_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest relative error of a row of logits."""
    difference = np.linalg.norm(ours - theirs, axis=-1)
    return float((difference / np.linalg.norm(theirs, axis=-1)).max())


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_logits_and_greedy_tokens_equal_transformers(name, tmp_path):
    config = tiny_models.tiny_config(name)
    model = their_model(config)
    model.save_pretrained(tmp_path)
    lm = load(tmp_path)
    assert isinstance(lm.decoder, Decoder)
    assert lm.decoder.config == config
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, (2, 48))
    with torch.no_grad():
        answer = model.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=64,
            pad_token_id=0,
        ).numpy()
        theirs = model(torch.tensor(answer)).logits.numpy()
    ours = our_logits(lm, answer.astype(np.int32))
    assert row_error(ours, theirs) < 1e-4
    assert row_error(np.zeros_like(theirs), theirs) > 0.5
    # Teacher-forced on their tokens: each of the 64 must be our own first choice.
    np.testing.assert_array_equal(ours[:, 47:-1].argmax(-1), answer[:, 48:])


def test_bfloat16_weights_stay_near_the_float32_logits(tmp_path):
    model = their_model(tiny_models.tiny_config("qwen3"))
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 97, (1, 32)).astype(np.int32)
    lm = load(tmp_path, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.params)} == {jnp.dtype(jnp.bfloat16)}
    with torch.no_grad():
        theirs = model(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    assert row_error(our_logits(lm, tokens), theirs) < 0.05


def test_sharded_and_bfloat16_files_load_as_the_whole_float32_ones(tmp_path):
    model = their_model(tiny_models.tiny_config("llama"))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    model.to(torch.float32).save_pretrained(tmp_path / "one")
    many, one = load(tmp_path / "many").params, load(tmp_path / "one").params
    jax.tree.map(np.testing.assert_array_equal, many, one)
