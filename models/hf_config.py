"""Reads a Hugging Face config.json: each key as transformers takes it, or refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexijax.models.config import (
    FAMILIES,
    ModelConfig,
    RopeScaling,
    check_int,
    check_positive,
)
from flexijax.models.files import short

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_context",
}
# What transformers takes where a key is absent. (An absent num_key_value_heads of a Llama, and an
# absent head_dim of all but Qwen3, are worked out from the other sizes, as is a null.)
_ABSENT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_ABSENT_HEAD_DIM = {"qwen3": 128}
_ABSENT_THETA = 10000.0
_ABSENT_WINDOW = 4096
_ABSENT_WINDOW_LAYERS = 28
_LAYER_TYPES = ("full_attention", "sliding_attention")


def config_from_hf(hf: Mapping[str, Any], *, max_context: int | None = None) -> ModelConfig:
    """Reads the contents of a Hugging Face config.json (any version up to transformers 5).

    max_context, when given, shortens the context; that is also how a model with a sliding window is
    run exactly: within its window it equals full attention. Raises one ValueError that lists
    everything in the config that this decoder does not do.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"model_type={short(family)}: must be one of {', '.join(FAMILIES)}")
    problems = _unsupported(hf)
    sizes: dict[str, Any] = {field: hf.get(key) for key, field in _REQUIRED.items()}
    for key, field in _REQUIRED.items():
        _collect(problems, hf, key, check_int, sizes[field])
    _collect(problems, hf, "rms_norm_eps", check_positive, hf.get("rms_norm_eps"))
    if problems:
        raise ValueError(f"unsupported {family} config: " + "; ".join(problems))

    heads = sizes["num_heads"]
    kv_heads = hf.get("num_key_value_heads", _ABSENT_KV_HEADS.get(family))
    head_dim = hf.get("head_dim", _ABSENT_HEAD_DIM.get(family))
    try:
        theta, scaling = _rope(hf)
        config = ModelConfig(
            family=family,
            **sizes,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=hf["hidden_size"] // heads if head_dim is None else head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(hf["rms_norm_eps"]),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            qkv_bias=family == "qwen2",
            qk_norm=family == "qwen3",
        )
        window = _sliding_window(hf)
    except ValueError as error:
        raise ValueError(f"unsupported {family} config: {error}") from error
    if max_context is not None:
        config = config.with_context(max_context)
    if window is not None and window < config.max_context:
        absent = "" if "sliding_window" in hf else " (as where the key is absent)"
        raise ValueError(
            f"sliding_window={window}{absent} is shorter than the context of {config.max_context} "
            f"tokens, and the cache attends the whole context: load with max_context={window}, "
            "within which the window changes nothing"
        )
    return config


def _collect(problems: list[str], hf: Mapping[str, Any], key: str, check: Any, value: Any) -> None:
    if value is None:
        problems.append(f"{key} is {'null' if key in hf else 'missing'}")
        return
    try:
        check(key, value)
    except ValueError as error:
        problems.append(str(error))


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    problems = []
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        problems.append(f"hidden_act={short(hf['hidden_act'])} (only 'silu')")
    if hf["model_type"] != "qwen2" and hf.get("attention_bias"):
        problems.append("attention_bias=true (only Qwen2's q, k, v bias)")
    if hf.get("mlp_bias"):
        problems.append("mlp_bias=true")
    if quantization := hf.get("quantization_config"):
        named = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        problems.append(
            f"quantization_config {short(named)} (use the unquantised model or a .gguf)"
        )
    return problems


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies."""
    # transformers 5 moved rope_theta and rope_scaling together into rope_parameters; where a file
    # has both, the old key wins there, and nothing is taken from the new one.
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(key) or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key}={short(rope)}: must be an object")
    for name, value in rope.items():
        if isinstance(value, Mapping):
            raise ValueError(f"{key} holds a table of its own for {short(name)} (only one for all)")
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial is not None and partial != 1:
        raise ValueError(f"partial_rotary_factor={short(partial)} (only 1.0)")
    theta = rope.get("rope_theta", hf.get("rope_theta", _ABSENT_THETA))
    check_positive("rope_theta", theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"{key}: rope_type={short(kind)} (only 'linear' and 'llama3')")
    if rope.get("factor") is None:
        raise ValueError(f"{key}: rope_type={kind!r} has no factor")
    check_positive(f"{key}: factor", rope["factor"])
    if kind == "linear":
        return float(theta), RopeScaling(kind="linear", factor=float(rope["factor"]))
    # A value beside the table wins over one inside it, which wins over the context.
    original = "original_max_position_embeddings"
    return float(theta), RopeScaling(
        kind="llama3",
        factor=float(rope["factor"]),
        low_freq_factor=rope.get("low_freq_factor"),
        high_freq_factor=rope.get("high_freq_factor"),
        original_max_position=hf.get(original, rope.get(original, hf["max_position_embeddings"])),
    )


def _sliding_window(hf: Mapping[str, Any]) -> int | None:
    """The window in tokens that some layer really uses, or None.

    Qwen configs name a window even when `use_sliding_window` turns it off, and when on, only
    layers from `max_window_layers` up (or those in `layer_types`) have it. Llama's layers have
    none, but where a file names one, transformers generates with a KV cache that long.
    """
    absent = None if hf["model_type"] == "llama" else _ABSENT_WINDOW
    window = hf.get("sliding_window", absent)
    if hf["model_type"] in ("qwen2", "qwen3"):
        used = hf.get("use_sliding_window", False)
        if not isinstance(used, bool):
            raise ValueError(f"use_sliding_window={short(used)}: must be true or false")
        if not _some_layer_slides(hf, used and window is not None):
            return None
        if not used or window is None:
            raise ValueError("layer_types has sliding_attention, but no sliding_window is in use")
    if window is not None:
        check_int("sliding_window", window)
    return window


def _some_layer_slides(hf: Mapping[str, Any], used: bool) -> bool:
    layers, types = hf["num_hidden_layers"], hf.get("layer_types")
    if types is None:
        first = hf.get("max_window_layers", _ABSENT_WINDOW_LAYERS)
        check_int("max_window_layers", first, min=0)
        return used and first < layers
    if not isinstance(types, list) or len(types) != layers:
        raise ValueError(f"layer_types={short(types)}: must be a list of {layers}, one a layer")
    for kind in types:
        if kind not in _LAYER_TYPES:
            raise ValueError(f"layer_types has {short(kind)} (only {', '.join(_LAYER_TYPES)})")
    return "sliding_attention" in types
