"""A config.json means here what it means to transformers, or it is refused by the key's name.

Each case is a folder, written once and read by both: logits and greedy tokens must be equal, or
`load` must name the key. What is never right is a model that loads and says something else.
"""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexijax.models.decoder import Decoder
from flexijax.models.dense import dense_attend
from flexijax.models.errors import LoadError
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from tests.test_models_parity import row_error

torch = pytest.importorskip("torch", reason="parity needs the torch extra")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what importing transformers warns of is not ours
    transformers = pytest.importorskip("transformers", reason="parity needs the torch extra")

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
)
LINEAR = dict(factor=4.0)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ORIGINAL = dict(original_max_position_embeddings=16)
YARN = dict(factor=4.0, **ORIGINAL)
LONG = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4, factor=4.0, **ORIGINAL)
ABSENT = object()  # the key is left out
SLIDING = ["full_attention", "sliding_attention"]


def rope(kind, table, **more):
    return dict(rope_type=kind, **table, **more)


# Name -> (family, what differs from BASE).
EQUAL = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "llama, untied": ("llama", dict(tie_word_embeddings=False)),
    "llama, head_dim": ("llama", dict(head_dim=16)),
    "llama, head_dim null": ("llama", dict(head_dim=None)),
    "llama, no key for KV heads": ("llama", dict(num_key_value_heads=ABSENT)),
    "llama, swish": ("llama", dict(hidden_act="swish")),
    "llama, no hidden_act": ("llama", dict(hidden_act=ABSENT)),
    "llama, large eps": ("llama", dict(rms_norm_eps=0.1)),
    "llama, old theta": ("llama", dict(rope_theta=100.0)),
    "llama, new theta": ("llama", dict(rope_parameters=rope("default", {}, rope_theta=100.0))),
    "llama, two thetas": (
        "llama",
        dict(rope_theta=50.0, rope_parameters=rope("default", {}, rope_theta=100.0)),
    ),
    "llama, a window as long as the context": ("llama", dict(sliding_window=64)),
    "linear, oldest": ("llama", dict(rope_scaling=dict(type="linear", **LINEAR))),
    "linear, old": ("mistral", dict(rope_scaling=rope("linear", LINEAR), rope_theta=500.0)),
    "linear, new": ("qwen2", dict(rope_parameters=rope("linear", LINEAR, rope_theta=500.0))),
    "linear, old beside new": (
        "qwen3",
        dict(
            rope_scaling=rope("linear", LINEAR),
            rope_parameters=rope("default", {}, rope_theta=100.0),
        ),
    ),
    "linear, old empty": ("llama", dict(rope_scaling={}, rope_parameters=rope("linear", LINEAR))),
    "linear, old null": ("llama", dict(rope_scaling=None, rope_parameters=rope("linear", LINEAR))),
    "two types": ("llama", dict(rope_scaling=rope("linear", LINEAR, type="yarn"))),
    "llama3, old": (
        "llama",
        dict(rope_scaling=rope("llama3", LLAMA3, **ORIGINAL), rope_theta=500.0),
    ),
    "llama3, new": (
        "llama",
        dict(rope_parameters=rope("llama3", LLAMA3, rope_theta=500.0, **ORIGINAL)),
    ),
    "llama3, original beside": (
        "llama",
        dict(
            rope_scaling=rope("llama3", LLAMA3, original_max_position_embeddings=48),
            rope_theta=500.0,
            **ORIGINAL,
        ),
    ),
    "llama3, no original": ("mistral", dict(rope_scaling=rope("llama3", LLAMA3))),
    "llama3, a context shorter than scaled": (
        "qwen2",
        dict(rope_scaling=rope("llama3", LLAMA3, original_max_position_embeddings=60)),
    ),
    "mistral": ("mistral", {}),
    "mistral, tied": ("mistral", dict(tie_word_embeddings=True)),
    "mistral, head_dim": ("mistral", dict(head_dim=16)),
    "mistral, a window as long as the context": ("mistral", dict(sliding_window=64)),
    "mistral, no key for a window of 4096": ("mistral", dict(sliding_window=ABSENT)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen2, attention_bias is no key of it": ("qwen2", dict(attention_bias=False)),
    "qwen2, window off": ("qwen2", dict(sliding_window=8, use_sliding_window=False)),
    "qwen2, window above all layers": (
        "qwen2",
        dict(sliding_window=8, use_sliding_window=True, max_window_layers=2),
    ),
    "qwen2, window of no layer": (
        "qwen2",
        dict(sliding_window=8, use_sliding_window=True, layer_types=["full_attention"] * 2),
    ),
    "qwen3": ("qwen3", dict(head_dim=8)),
    "qwen3, no head_dim": ("qwen3", {}),
    "qwen3, tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}
# ... and what the error must name.
REFUSED = {
    "yarn, old": ("llama", dict(rope_scaling=rope("yarn", YARN)), "rope_scaling: .*'yarn'"),
    "yarn, oldest": ("qwen2", dict(rope_scaling=dict(type="yarn", **YARN)), "rope_scaling: .*yarn"),
    "yarn, new": ("qwen3", dict(rope_parameters=rope("yarn", YARN)), "rope_parameters: .*'yarn'"),
    "yarn, beside new": (
        "llama",
        dict(rope_scaling=rope("yarn", YARN), rope_parameters=rope("default", {})),
        "rope_scaling: .*'yarn'",
    ),
    "dynamic, old": ("llama", dict(rope_scaling=rope("dynamic", LINEAR)), "rope_scaling: .*'dyn"),
    "dynamic, new": ("mistral", dict(rope_parameters=rope("dynamic", LINEAR)), "rope_param.*'dyn"),
    "longrope, old": ("llama", dict(rope_scaling=rope("longrope", LONG)), "rope_scaling: .*'longr"),
    "longrope, new": ("llama", dict(rope_parameters=rope("longrope", LONG)), "rope_param.*'longr"),
    "linear without a factor": ("llama", dict(rope_scaling=rope("linear", {})), "factor"),
    "partial rotation": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "partial rotation, new": (
        "qwen3",
        dict(rope_parameters=rope("default", {}, partial_rotary_factor=0.5)),
        "partial_rotary_factor=0.5",
    ),
    "partial rotation beside": (
        "llama",
        dict(partial_rotary_factor=0.5, rope_parameters=rope("default", {}, rope_theta=100.0)),
        "partial_rotary_factor=0.5",
    ),
    "a table for each layer type": (
        "qwen3",
        dict(rope_parameters={"full_attention": rope("default", {}, rope_theta=100.0)}),
        "rope_parameters holds a table of its own for 'full_attention'",
    ),
    "mistral, window": ("mistral", dict(sliding_window=16), "sliding_window=16"),
    "mistral, no key for a window that is short": (
        "mistral",
        dict(sliding_window=ABSENT, max_position_embeddings=8192),
        "sliding_window=4096 .as where the key is absent",
    ),
    "llama, window": ("llama", dict(sliding_window=16), "sliding_window=16"),
    "qwen2, window": (
        "qwen2",
        dict(sliding_window=16, use_sliding_window=True, max_window_layers=1),
        "sliding_window=16",
    ),
    "qwen3, window": (
        "qwen3",
        dict(sliding_window=16, use_sliding_window=True, layer_types=SLIDING),
        "sliding_window=16",
    ),
    "qwen3, window on, unnamed": (
        "qwen3",
        dict(use_sliding_window=True, max_window_layers=0, max_position_embeddings=8192),
        "sliding_window=4096",
    ),
    "llama, attention_bias": ("llama", dict(attention_bias=True), "attention_bias"),
    "qwen3, attention_bias": ("qwen3", dict(attention_bias=True), "attention_bias"),
    "llama, mlp_bias": ("llama", dict(mlp_bias=True), "mlp_bias"),
    "gelu": ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    "gelu of tanh": ("qwen2", dict(hidden_act="gelu_pytorch_tanh"), "hidden_act='gelu_py"),
    "relu": ("mistral", dict(hidden_act="relu"), "hidden_act='relu'"),
}


def config_of(family: str, changes: dict) -> dict:
    window = {"sliding_window": None} if family == "mistral" else {}
    config = {"model_type": family, **BASE, **window, **changes}
    return {key: value for key, value in config.items() if value is not ABSENT}


def write(folder, config: dict, *, shard: str = "5GB") -> None:
    """A random model of that very config.json, every weight far from its default."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            vector = parameter.ndim == 1
            parameter.copy_(
                1 + 0.3 * noise if vector else 1.5 * noise * parameter.shape[-1] ** -0.5
            )
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()


def logits_of(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """float32[B, T, V] by dense attention, not compiled as a whole: models of one shape share."""
    positions = jnp.arange(tokens.shape[1])[None, :]
    attention_fn = dense_attend(lm.attention)
    x, _ = lm.decoder.hidden(lm.params, jnp.asarray(tokens), positions, attention_fn, None)
    return np.asarray(lm.decoder.logits(lm.params, x))


def assert_equal(folder, *, length: int = 24, new: int = 16, max_context: int | None = None):
    """Logits of the whole text equal, and each of its greedy tokens our own first choice."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    lm = load(folder, max_context=max_context)
    prompt = np.random.default_rng(0).integers(0, lm.vocab_size, (1, length))
    with torch.no_grad():
        answer = model.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            pad_token_id=0,
            eos_token_id=None,
        ).numpy()
        theirs = model(torch.tensor(answer)).logits.numpy()
    ours = logits_of(lm, answer.astype(np.int32))
    assert row_error(ours, theirs) < 1e-4
    np.testing.assert_array_equal(ours[:, length - 1 : -1].argmax(-1), answer[:, length:])
    return lm, answer


@pytest.mark.parametrize("name", EQUAL)
def test_what_loads_says_what_transformers_says(name, tmp_path):
    family, changes = EQUAL[name]
    write(tmp_path, config_of(family, changes))
    assert_equal(tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_this_decoder_does_not_do_is_refused_by_its_key(name, tmp_path):
    family, changes, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(config_of(family, changes)))
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


def test_a_window_is_exact_within_it(tmp_path):
    write(tmp_path, config_of("mistral", dict(sliding_window=16)))
    assert_equal(tmp_path, length=6, new=10, max_context=16)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_sharded_files(family, tmp_path):
    write(tmp_path, config_of(family, {}), shard="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equal(tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_head_of_its_own_beside_the_tied_flag_is_used(shard, tmp_path):
    """As transformers 5 does, where both arrays are in the checkpoint and differ."""
    write(tmp_path, config_of("llama", dict(tie_word_embeddings=False)), shard=shard)
    tied = config_of("llama", dict(tie_word_embeddings=True))
    (tmp_path / "config.json").write_text(json.dumps(tied))
    lm, _ = assert_equal(tmp_path)
    assert isinstance(lm.decoder, Decoder) and not lm.decoder.config.tie_embeddings


def test_a_copy_of_the_embedding_beside_the_tied_flag_stays_tied(tmp_path):
    write(tmp_path, config_of("llama", dict(tie_word_embeddings=True)))
    file = tmp_path / "model.safetensors"
    arrays = load_file(file)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, file, metadata={"format": "pt"})
    lm, _ = assert_equal(tmp_path)
    assert "lm_head" not in lm.params


def test_the_net_has_no_holes_of_that_size(tmp_path):
    """A wrong theta, eps or pairing of halves is far above the tolerance."""
    write(tmp_path, config_of("llama", {}))
    lm, text = assert_equal(tmp_path)
    right = logits_of(lm, text.astype(np.int32))
    config = config_of("llama", {})
    for change in (dict(rope_theta=9000.0), dict(rms_norm_eps=1e-3)):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        wrong = logits_of(load(tmp_path), text.astype(np.int32))
        assert row_error(wrong, right) > 1e-3, change
