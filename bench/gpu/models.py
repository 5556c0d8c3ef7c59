"""Random models, caches for them, and requests of random tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.aot.footprint import assumed_profile, shipped_profile
from flexijax.config import CacheConfig
from flexijax.engine.sampling import Sampling
from flexijax.engine.sequence import Request
from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.models.language_model import LanguageModel, from_config


def random_model(config: ModelConfig, *, name: str, dtype: str) -> LanguageModel:
    """A model of that configuration with random weights, without a tokenizer."""
    params = Decoder(config).init(jax.random.key(0), dtype=jnp.dtype(dtype))
    return from_config(config, params, name=name, dtype=jnp.dtype(dtype), tokenizer=None)


def cache_for(config: ModelConfig, name: str, *, policy: str, budget_tokens: int) -> CacheConfig:
    """A cache with the profile shipped for the model, or a quarter of the heads unstable."""
    cache = CacheConfig(policy=policy, budget_tokens=budget_tokens)
    profile = shipped_profile(name, cache.budget_pages) or assumed_profile(config, cache)
    return dataclasses.replace(cache, profile=profile)


def random_tokens(config: ModelConfig, length: int, seed: int) -> list[int]:
    """Token ids."""
    return np.random.default_rng(seed).integers(0, config.vocab_size, length).tolist()


def greedy_request(index: int, tokens: list[int], max_new_tokens: int) -> Request:
    """A request that generates all its tokens, whatever they are."""
    return Request(
        index=index,
        tokens=tuple(tokens),
        max_new_tokens=max_new_tokens,
        sampling=Sampling(ignore_eos=True),
        seed=0,
        stop_ids=(),
    )
