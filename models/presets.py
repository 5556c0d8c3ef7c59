"""The models this project is measured on, by name: configurations only, no weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from flexijax.models.config import ModelConfig, RopeScaling
from flexijax.models.decoder import Decoder, Params

_LLAMA_31 = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_context=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    ),
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)

# Each row holds only what differs from Llama-3.1-8B.
_ROWS: dict[str, dict] = {
    "llama-3.1-8b": {},
    "mistral-7b-v0.2": dict(
        family="mistral",
        vocab_size=32000,
        max_context=32768,
        rope_theta=1000000.0,
        rope_scaling=None,
    ),
    "mistral-small-24b": dict(
        family="mistral",
        vocab_size=131072,
        hidden_size=5120,
        intermediate_size=32768,
        num_layers=40,
        max_context=32768,
        rope_theta=100000000.0,
        rope_scaling=None,
    ),
    "qwen2.5-32b": dict(
        family="qwen2",
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_layers=64,
        num_heads=40,
        max_context=32768,
        rope_theta=1000000.0,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        qkv_bias=True,
    ),
    "qwen3-8b": dict(
        family="qwen3",
        vocab_size=151936,
        intermediate_size=12288,
        num_layers=36,
        max_context=40960,
        rope_theta=1000000.0,
        rope_scaling=None,
        rms_norm_eps=1e-6,
        qk_norm=True,
    ),
    "smollm2-135m": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_context=8192,
        rope_theta=100000.0,
        rope_scaling=None,
        tie_embeddings=True,
    ),
}

NAMES = tuple(_ROWS)


def config(name: str) -> ModelConfig:
    """The configuration of one of `NAMES`; ValueError for another name."""
    if name not in _ROWS:
        raise ValueError(f"name={name!r}: presets are {', '.join(NAMES)}")
    return dataclasses.replace(_LLAMA_31, **_ROWS[name])


def abstract_params(name: str, *, dtype: Any) -> Params:
    """The params of a preset as `jax.ShapeDtypeStruct`s, for compiling without weights."""
    return Decoder(config(name)).abstract(dtype=dtype)
