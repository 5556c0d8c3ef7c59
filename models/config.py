"""What a decoder model is made of, as plain data that checks itself."""

from __future__ import annotations

import dataclasses
import numbers
import sys
from typing import Any

import numpy as np

from flexijax.models.files import short

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MAX_INT = 2**31 - 1  # positions, token ids and array sizes are int32


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a model stretches its rotary frequencies beyond the context it was pretrained on.

    kind "linear" divides every frequency by `factor`. kind "llama3" (Llama 3.1) divides only
    wavelengths longer than `original_max_position / low_freq_factor` tokens, leaves those shorter
    than `original_max_position / high_freq_factor`, and blends between; the last three fields are
    for this kind alone. Other kinds are refused: their attention would be silently wrong.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            kind = short(self.kind)
            raise ValueError(f"kind={kind}: rope scaling must be 'linear' or 'llama3'")
        check_positive("factor", self.factor)
        if not self.factor >= 1:
            raise ValueError(f"factor={self.factor}: rope scaling factor must be at least 1")
        if self.kind == "linear":
            return
        low, high, original = (
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_position,
        )
        if low is None or high is None or original is None:
            raise ValueError(
                f"low_freq_factor={short(low)}, high_freq_factor={short(high)}, "
                f"original_max_position={short(original)}: kind 'llama3' needs all three"
            )
        check_positive("low_freq_factor", low)
        check_positive("high_freq_factor", high)
        check_int("original_max_position", original)
        if not low < high:
            raise ValueError(f"low_freq_factor={low}: must be below high_freq_factor={high}")


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What a KV cache needs to know of a model: the counts, the head size and the softmax scale.

    Query head n belongs to KV head n // group_size.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            check_int(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        check_positive("scale", self.scale)

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_heads // self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every constant of one Llama, Mistral or Qwen decoder; nothing has a default.

    max_context is the longest sequence in tokens, rope_theta the base of the rotary frequencies.
    qkv_bias: the q, k, v projections have a bias (Qwen2). qk_norm: q and k are RMS-normalised per
    head before RoPE (Qwen3). tie_embeddings: the logits head is the embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"family={short(self.family)}: must be one of {known}")
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "max_context"),
            *("num_layers", "num_heads", "num_kv_heads", "head_dim"),
        ):
            check_int(name, getattr(self, name))
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE needs an even head_dim")
        for name in ("rope_theta", "rms_norm_eps"):
            check_positive(name, getattr(self, name))
        for name in ("tie_embeddings", "qkv_bias", "qk_norm"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={short(value)}: must be true or false")
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(
                f"rope_scaling={short(self.rope_scaling)}: must be None or RopeScaling"
            )
        _ = self.attention_shape

    @property
    def attention_shape(self) -> AttentionShape:
        """The part of the config a KV cache works with; scale is 1 / sqrt(head_dim)."""
        return AttentionShape(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
        )

    def with_context(self, max_context: int) -> ModelConfig:
        """The same model with a context shortened to max_context tokens."""
        check_int("max_context", max_context)
        if max_context > self.max_context:
            raise ValueError(
                f"max_context={max_context}: must be from 1 to the model's {self.max_context}"
            )
        return dataclasses.replace(self, max_context=max_context)


def check_int(name: str, value: Any, *, min: int = 1) -> None:
    """ValueError unless value is an integer from min to 2^31 - 1, no bool."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not min <= int(value) <= MAX_INT:
        raise ValueError(f"{name}={short(value)}: must be an integer from {min} to {MAX_INT}")


def check_positive(name: str, value: Any) -> None:
    """ValueError unless value is a number above 0 that a float can hold."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={short(value)}: must be a positive finite number")
