"""Tiny random models of every family, for any test that needs a model and no file."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexijax.models.config import ModelConfig, RopeScaling
from flexijax.models.decoder import Decoder
from flexijax.models.language_model import LanguageModel, from_config

_BASE = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_context=512,
    rope_theta=10000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)
# Each row holds only what differs from a plain Llama.
_ROWS: dict[str, dict] = {
    "llama": {},
    "llama-tied": dict(tie_embeddings=True),
    "llama-3.1": dict(
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=64,
        ),
    ),
    "llama-linear": dict(rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "mistral": dict(family="mistral", rope_theta=1000000.0),
    "mistral-wide": dict(family="mistral", head_dim=16, num_heads=4, num_kv_heads=1),
    "qwen2": dict(family="qwen2", qkv_bias=True, rms_norm_eps=1e-6),
    "qwen3": dict(family="qwen3", qk_norm=True, head_dim=16, num_heads=4, rms_norm_eps=1e-6),
}

NAMES = tuple(_ROWS)


def tiny_config(name: str, **changes) -> ModelConfig:
    """The configuration of one of `NAMES`, with any field changed."""
    return dataclasses.replace(_BASE, **(_ROWS[name] | changes))


def tiny_model(
    name: str = "llama", *, seed: int = 0, dtype=jnp.float32, **changes
) -> LanguageModel:
    """A random model of one of `NAMES`, without a tokenizer; changes are fields of its config."""
    config = tiny_config(name, **changes)
    params = Decoder(config).init(jax.random.key(seed), dtype=dtype)
    return from_config(config, params, name=f"tiny-{name}", dtype=jnp.dtype(dtype), tokenizer=None)
