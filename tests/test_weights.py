"""Loading: GGUF in every type, safetensors, and one error that lists every problem."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.models.load import load, resolve
from flexijax.models.weights import LoadError
from tests import tiny_models

WIDE = dict(hidden_size=256, intermediate_size=256, head_dim=32, num_heads=8, num_layers=1)


def tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under their Hugging Face names, linear maps [out, in]."""
    c, rng = config, np.random.default_rng(seed)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {"model.embed_tokens": (c.vocab_size, c.hidden_size), "model.norm": (c.hidden_size,)}
    if not c.tie_embeddings:
        shapes["lm_head"] = (c.vocab_size, c.hidden_size)
    for layer in range(c.num_layers):
        p = f"model.layers.{layer}."
        shapes |= {
            p + "input_layernorm": (c.hidden_size,),
            p + "post_attention_layernorm": (c.hidden_size,),
            p + "self_attn.q_proj": (q, c.hidden_size),
            p + "self_attn.k_proj": (kv, c.hidden_size),
            p + "self_attn.v_proj": (kv, c.hidden_size),
            p + "self_attn.o_proj": (c.hidden_size, q),
            p + "mlp.gate_proj": (c.intermediate_size, c.hidden_size),
            p + "mlp.up_proj": (c.intermediate_size, c.hidden_size),
            p + "mlp.down_proj": (c.hidden_size, c.intermediate_size),
        }
        if c.qk_norm:
            shapes |= {p + f"self_attn.{x}_norm": (c.head_dim,) for x in "qk"}
    named = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    if c.qkv_bias:
        for layer in range(c.num_layers):
            for x, size in (("q", q), ("k", kv), ("v", kv)):
                name = f"model.layers.{layer}.self_attn.{x}_proj.bias"
                named[name] = rng.standard_normal(size).astype(np.float32)
    return named


def hf_config(config: ModelConfig) -> dict:
    return dict(
        model_type=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_context,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
    )


def write_safetensors(path, named: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(named, path)


def write_hf(directory, config: ModelConfig, named: dict[str, np.ndarray]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(config)))
    write_safetensors(directory / "model.safetensors", named)


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(
    path: Path,
    config: ModelConfig,
    named: dict[str, np.ndarray],
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, str | int] = MappingProxyType({}),
) -> None:
    """Writes weights as llama.cpp's converter does, q and k of a llama interleaved."""
    arch = "llama" if config.family == "mistral" else config.family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    for name, value in named.items():
        stem, suffix = name.rsplit(".", 1)
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if stem in ("self_attn.q_proj", "self_attn.k_proj") and arch == "llama":
            heads = config.num_heads if "q_proj" in stem else config.num_kv_heads
            halves = value.reshape(heads, 2, config.head_dim // 2, -1)
            value = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(value.shape)
        gguf_name = f"{prefix}{GGUF_NAMES.get(stem, stem)}.{suffix}"
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name, value)
        else:
            writer.add_tensor(gguf_name, gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-wide", "qwen2", "qwen3"])
def test_gguf_and_safetensors_give_the_same_params(name, tmp_path):
    config = tiny_models.tiny_config(name)
    named = tensors(config)
    write_hf(tmp_path / "hf", config, named)
    write_gguf(tmp_path / "m.gguf", config, named)
    seen = []
    ours = load(tmp_path / "hf", progress=seen.append)
    theirs = load(tmp_path / "m.gguf")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.tokenizer is None
    assert seen == sorted(seen) and seen[-1] == 1.0
    expected = Decoder(config).abstract(dtype=jnp.float32)
    assert jax.tree.structure(ours.params) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), ours.params, expected)


def quantizable() -> list[gguf.GGMLQuantizationType]:
    kinds = []
    for kind in gguf.GGMLQuantizationType:
        try:
            gguf.quantize(np.ones((1, 256), np.float32), kind)
        except (NotImplementedError, KeyError):
            continue
        kinds.append(kind)
    return kinds


@pytest.mark.parametrize("kind", quantizable(), ids=lambda kind: kind.name)
def test_every_type_that_gguf_can_write_is_read(kind, tmp_path):
    config = tiny_models.tiny_config("qwen2", **WIDE)
    named = {k: v for k, v in tensors(config).items()}
    write_gguf(tmp_path / "m.gguf", config, named, kind=kind)
    lm = load(tmp_path / "m.gguf")
    stored = named["lm_head.weight"]
    expected = gguf.dequantize(gguf.quantize(stored, kind), kind)
    np.testing.assert_array_equal(np.asarray(lm.params["ends"]["head"]), expected)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_XXS"])
def test_types_that_gguf_only_reads_are_read(kind, tmp_path):
    """Random blocks, with scales that are finite: only llama.cpp can write these types."""
    quant = gguf.GGMLQuantizationType[kind]
    config = tiny_models.tiny_config("qwen2", **WIDE)
    named = tensors(config)
    path = tmp_path / "m.gguf"
    write_gguf(path, config, named)
    block, size = gguf.GGML_QUANT_SIZES[quant]
    count = named["lm_head.weight"].size // block
    raw = np.random.default_rng(0).integers(0, 50, (count, size), dtype=np.uint8)
    rows = raw.reshape(config.vocab_size, -1)
    writer_named = {k: v for k, v in named.items() if k != "lm_head.weight"}
    path2 = tmp_path / "n.gguf"
    original = gguf.GGUFWriter.write_header_to_file

    def with_head(self, *args, **kwargs):
        self.add_tensor("output.weight", rows, raw_dtype=quant)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_head)
        write_gguf(path2, config, writer_named)
    lm = load(path2)
    expected = gguf.dequantize(rows, quant)
    np.testing.assert_array_equal(np.asarray(lm.params["ends"]["head"]), expected)


def test_llama_3_frequencies_of_a_gguf_become_a_config(tmp_path):
    config = tiny_models.tiny_config("llama", head_dim=64, num_heads=2, rope_theta=500000.0)
    frequency = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    turns = 8192 * frequency / (2 * np.pi)
    keep = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / (keep + (1 - keep) / 32)).astype(np.float32)
    named = tensors(config)
    write_gguf(tmp_path / "m.gguf", config, named | {"rope_freqs.weight": divisors})
    decoder = load(tmp_path / "m.gguf").decoder
    assert isinstance(decoder, Decoder)
    scaling = decoder.config.rope_scaling
    assert scaling is not None and scaling.kind == "llama3"
    assert scaling.factor == pytest.approx(32)
    strange = {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}
    write_gguf(tmp_path / "n.gguf", config, named | strange)
    with pytest.raises(LoadError, match="a kind other than Llama 3's"):
        load(tmp_path / "n.gguf")


def test_a_gguf_of_another_kind_is_refused(tmp_path):
    config, path = tiny_models.tiny_config("llama"), tmp_path / "m.gguf"
    named = tensors(config)
    for metadata, message in (
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"rope.dimension_count": 4}, "rope.dimension_count=4: must be 8"),
        ({"expert_count": 8}, "expert_count=8"),
        ({"attention.sliding_window": 64}, "sliding_window=64"),
    ):
        write_gguf(path, config, named, metadata=metadata)
        with pytest.raises(LoadError, match=message):
            load(path)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LoadError, match="architecture 'gpt2': must be llama"):
        load(path)


def test_damaged_gguf_files_are_one_clear_error(tmp_path):
    config, path = tiny_models.tiny_config("llama"), tmp_path / "m.gguf"
    write_gguf(path, config, tensors(config))
    whole = path.read_bytes()
    for length in (0, 3, 20, 100, 700):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="truncated or not a GGUF file"):
            load(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(LoadError, match="the file ends .* bytes early"):
        load(path)
    path.write_bytes(whole.replace(b"GGUF", b"JUNK", 1))
    with pytest.raises(LoadError, match="does not begin with 'GGUF'"):
        load(path)
    huge = bytearray(whole)
    huge[8:16] = struct.pack("<Q", 2**60)  # the count of tensors
    path.write_bytes(bytes(huge))
    with pytest.raises(LoadError, match="truncated or not a GGUF file"):
        load(path)


def test_flipped_header_bytes_never_crash(tmp_path):
    config, path = tiny_models.tiny_config("llama", num_layers=1), tmp_path / "m.gguf"
    write_gguf(path, config, tensors(config))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(whole)
        broken[rng.integers(0, 900)] = rng.integers(0, 256)
        path.write_bytes(bytes(broken))
        try:
            load(path)
        except LoadError:
            pass


def test_every_problem_of_a_checkpoint_is_listed_at_once(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    del named["model.norm.weight"], named["model.layers.1.mlp.up_proj.weight"]
    named["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 4), np.float32)
    named["model.layers.7.mlp.up_proj.weight"] = np.zeros((80, 48), np.float32)
    named["visual.patch.weight"] = np.zeros((2, 2), np.float32)
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert set(caught.value.problems) == {
        "missing tensor: final_norm",
        "missing tensor: up of layer 1",
        "model.layers.0.self_attn.q_proj.weight: shape (3, 4), the config says (48, 48)",
        "model.layers.7.mlp.up_proj.weight: the config has no place for it",
        "visual.patch.weight: not a tensor of this model family",
    }


def test_values_that_are_not_finite_are_listed(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    named["lm_head.weight"][3, 4] = np.nan
    named["model.norm.weight"][0] = np.inf
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 2
    assert all("not finite" in problem for problem in caught.value.problems)


def test_a_tied_model_may_carry_its_head(tmp_path):
    config = tiny_models.tiny_config("llama-tied")
    named = tensors(config)
    named["lm_head.weight"] = named["model.embed_tokens.weight"]
    write_hf(tmp_path / "m", config, named)
    assert "head" not in load(tmp_path / "m").params["ends"]


def test_damaged_directories_are_one_clear_error(tmp_path):
    config = tiny_models.tiny_config("llama")
    write_hf(tmp_path / "m", config, tensors(config))
    path = tmp_path / "m" / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 200):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="truncated or not a safetensors file"):
            load(tmp_path / "m")
    path.write_bytes(whole[:-5000])
    with pytest.raises(LoadError, match="model.safetensors ends .* bytes too early"):
        load(tmp_path / "m")
    path.unlink()
    with pytest.raises(LoadError, match="no model.safetensors and no"):
        load(tmp_path / "m")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="model-1.safetensors: named in") as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 2
    (tmp_path / "m" / "config.json").write_text("{")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 2


def test_integer_tensors_are_refused(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config) | {"lm_head.weight": np.zeros((97, 48), np.int32)}
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError, match="lm_head.weight: dtype I32"):
        load(tmp_path / "m")


def test_names_that_lead_nowhere_say_what_was_tried(tmp_path):
    with pytest.raises(LoadError) as caught:
        resolve("nobody/nothing-at-all")
    message = str(caught.value)
    assert "does not exist" in message and "hub id 'nobody/nothing-at-all'" in message
    assert "hf download nobody/nothing-at-all" in message and "smollm2" in message
    with pytest.raises(LoadError, match="not of the form owner/name"):
        resolve("smol lm")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(LoadError, match="not a .gguf"):
        resolve(tmp_path / "x.bin")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='int4': must be one of float32"):
        load("smollm2", dtype="int4")


def test_dtype_and_sharding_are_applied(tmp_path):
    config = tiny_models.tiny_config("qwen3")
    write_hf(tmp_path / "m", config, tensors(config))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lm = load(tmp_path / "m", dtype="bfloat16", sharding=sharding, max_context=64)
    assert lm.max_context == 64 and lm.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(lm.params):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding == sharding
