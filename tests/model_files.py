"""Model files of tiny random models, as the tools of Hugging Face and llama.cpp write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np

from flexijax.models.config import ModelConfig


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
    packed: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] = MappingProxyType({}),
    words: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Writes weights as llama.cpp's converter does, q and k of a llama interleaved.

    kind: of the matrices. metadata: of the architecture. packed: tensors as bytes, with their type.
    words: metadata of the tokenizer, by their whole names.
    """
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
    for key, value in words.items():
        writer.add_key_value(key, value, *_gguf_type(value))
    for name, (rows, packed_kind) in packed.items():
        writer.add_tensor(name, rows, raw_dtype=packed_kind)
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


def _gguf_type(value: Any) -> tuple[gguf.GGUFValueType, ...]:
    if isinstance(value, list):
        return gguf.GGUFValueType.ARRAY, *_gguf_type(value[0])
    kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
    return (gguf.GGUFValueType[kinds[type(value)]],)
