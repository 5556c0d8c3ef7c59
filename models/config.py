"""What a decoder model is made of, as plain data, and how to read it from a Hugging Face config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


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
            raise ValueError(f"kind={self.kind!r}: rope scaling must be 'linear' or 'llama3'")
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
                f"{low=}, {high=}, {original=}: kind 'llama3' needs low_freq_factor, "
                "high_freq_factor and original_max_position"
            )
        if not 0 < low < high or original < 1:
            raise ValueError(
                f"{low=}, {high=}, {original=}: must have 0 < low_freq_factor < high_freq_factor "
                "and original_max_position of at least 1"
            )


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
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}"
            )
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale}: the softmax scale must be positive")

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
            raise ValueError(f"family={self.family!r}: must be one of {', '.join(FAMILIES)}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_context"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: RoPE needs an even head_dim")
        if not self.rope_theta > 0:
            raise ValueError(f"rope_theta={self.rope_theta}: must be positive")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps}: must be positive")
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
        if not 1 <= max_context <= self.max_context:
            raise ValueError(
                f"max_context={max_context}: must be from 1 to the model's {self.max_context}"
            )
        return dataclasses.replace(self, max_context=max_context)

    @staticmethod
    def from_hf(hf: Mapping[str, Any], *, max_context: int | None = None) -> ModelConfig:
        """Reads the contents of a Hugging Face config.json (any version up to transformers 5).

        max_context, when given, shortens the context; that is also how a model with a sliding
        window is run exactly: within its window it equals full attention. Raises one ValueError
        that lists everything in the config that this decoder does not do.
        """
        return _from_hf(hf, max_context)


def _from_hf(hf: Mapping[str, Any], max_context: int | None) -> ModelConfig:
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type={family!r}: must be one of {', '.join(FAMILIES)}")
    required = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    problems = [f"{name} is missing" for name in required if hf.get(name) is None]
    problems += _unsupported(hf)
    # transformers 5 moved rope_theta and rope_scaling together into rope_parameters.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    scaling = None
    try:
        scaling = _rope_scaling(rope, hf)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"unsupported {family} config: " + "; ".join(problems))

    num_heads = int(hf["num_attention_heads"])
    config = ModelConfig(
        family=family,
        vocab_size=int(hf["vocab_size"]),
        hidden_size=int(hf["hidden_size"]),
        intermediate_size=int(hf["intermediate_size"]),
        num_layers=int(hf["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(hf.get("num_key_value_heads") or num_heads),
        head_dim=int(hf.get("head_dim") or hf["hidden_size"] // num_heads),
        max_context=int(hf["max_position_embeddings"]),
        # The file format itself says 10000 where the key is absent (Llama 2 and older).
        rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
        rope_scaling=scaling,
        rms_norm_eps=float(hf["rms_norm_eps"]),
        # Absent means the transformers default, which is untied for all four families.
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )
    if max_context is not None:
        config = config.with_context(max_context)
    window = _sliding_window(hf)
    if window is not None and window < config.max_context:
        raise ValueError(
            f"sliding_window={window} is shorter than the context of {config.max_context} tokens, "
            f"and the cache attends the whole context: load with max_context={window}, within "
            "which the window changes nothing"
        )
    return config


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    problems = []
    if hf.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act={hf['hidden_act']!r} (only 'silu')")
    if hf["model_type"] != "qwen2" and hf.get("attention_bias"):
        problems.append("attention_bias=true (only Qwen2's q, k, v bias)")
    if hf.get("mlp_bias"):
        problems.append("mlp_bias=true")
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        problems.append(f"quantization_config {method!r} (use the unquantised model or a .gguf)")
    partial = (hf.get("rope_parameters") or hf).get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        problems.append(f"partial_rotary_factor={partial} (only 1.0)")
    return problems


def _rope_scaling(rope: Mapping[str, Any], hf: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope scaling {kind!r} (only 'linear' and 'llama3')")
    if rope.get("factor") is None:
        raise ValueError(f"rope scaling {kind!r} has no factor")
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    return RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=rope.get("low_freq_factor"),
        high_freq_factor=rope.get("high_freq_factor"),
        original_max_position=rope.get(
            "original_max_position_embeddings", hf.get("original_max_position_embeddings")
        ),
    )


def _sliding_window(hf: Mapping[str, Any]) -> int | None:
    """The window in tokens that some layer really uses, or None.

    Qwen configs name a window even when `use_sliding_window` turns it off, and when on, only
    layers from `max_window_layers` up (or those in `layer_types`) have it. Llama has none.
    """
    window = hf.get("sliding_window")
    if window is None or hf["model_type"] == "llama":
        return None
    if hf["model_type"] in ("qwen2", "qwen3"):
        if not hf.get("use_sliding_window", False):
            return None
        types = hf.get("layer_types")
        if types is not None:
            return int(window) if "sliding_attention" in types else None
        if hf.get("max_window_layers", 28) >= hf["num_hidden_layers"]:
            return None
    return int(window)
