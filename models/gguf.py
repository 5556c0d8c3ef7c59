"""Reads models from .gguf files: config from the metadata, weights of every type `gguf` knows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from flexijax.models.config import ModelConfig, RopeScaling
from flexijax.models.errors import LoadError
from flexijax.models.files import short
from flexijax.models.gguf_header import read_header
from flexijax.models.hf_config import config_from_hf
from flexijax.models.layers import rope_frequencies
from flexijax.models.mapping import map_file
from flexijax.models.parts import NameTable

_ROWS = (
    (r"token_embd\.weight", "embedding"),
    (r"output_norm\.weight", "final_norm"),
    (r"output\.weight", "lm_head"),
    (r"blk\.(\d+)\.attn_norm\.weight", "attention_norm"),
    (r"blk\.(\d+)\.attn_q\.weight", "q"),
    (r"blk\.(\d+)\.attn_k\.weight", "k"),
    (r"blk\.(\d+)\.attn_v\.weight", "v"),
    (r"blk\.(\d+)\.attn_q\.bias", "q_bias"),
    (r"blk\.(\d+)\.attn_k\.bias", "k_bias"),
    (r"blk\.(\d+)\.attn_v\.bias", "v_bias"),
    (r"blk\.(\d+)\.attn_q_norm\.weight", "q_norm"),
    (r"blk\.(\d+)\.attn_k_norm\.weight", "k_norm"),
    (r"blk\.(\d+)\.attn_output\.weight", "out"),
    (r"blk\.(\d+)\.ffn_norm\.weight", "mlp_norm"),
    (r"blk\.(\d+)\.ffn_gate\.weight", "gate"),
    (r"blk\.(\d+)\.ffn_up\.weight", "up"),
    (r"blk\.(\d+)\.ffn_down\.weight", "down"),
)
# The stretched rotary frequencies of Llama 3.1 travel as a tensor; they go into the config.
_ROPE_TENSOR = "rope_freqs.weight"


class GgufFile:
    """One .gguf file: `metadata` by key, tensors as a `TensorSource`.

    Raises LoadError for a file that is not readable as GGUF or is shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._data = map_file(path)
            self.metadata, self._tensors = read_header(self._data)
        except ValueError as error:
            raise LoadError(str(path), [f"truncated or not a GGUF file: {error}"]) from error
        size = len(self._data)
        short = {n: t.stop - size for n, t in self._tensors.items() if t.stop > size}
        if short:
            raise LoadError(
                str(path), [f"{n}: the file ends {k} bytes early" for n, k in short.items()]
            )
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def table(self) -> NameTable:
        """The names of the tensors; llama's q and k rows are interleaved by the converter."""
        interleaved = self.metadata.get("general.architecture") == "llama"
        return NameTable(_ROWS, (_ROPE_TENSOR.replace(".", r"\."),), interleaved)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of a tensor, dequantised to float32 unless stored as a float."""
        tensor = self._tensors[name]
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        row = math.prod(tensor.shape[1:]) // block * size if tensor.shape[1:] else size // block
        packed = self._data[tensor.start + start * row : tensor.start + stop * row]
        try:
            values = gguf.dequantize(packed.reshape(stop - start, -1), tensor.kind)
        except NotImplementedError as error:
            kind = tensor.kind.name
            raise ValueError(f"type {kind} cannot be dequantised by this gguf package") from error
        return values.reshape(stop - start, *tensor.shape[1:])

    def config(self, *, max_context: int | None) -> ModelConfig:
        """The model's configuration; LoadError lists what is missing or not supported."""
        problems: list[str] = []
        arch = self.metadata.get("general.architecture")
        if arch not in ("llama", "qwen2", "qwen3"):
            problem = f"architecture {short(arch)}: must be llama (Mistral too), qwen2 or qwen3"
            raise LoadError(str(self.path), [problem])
        meta = {
            key.removeprefix(f"{arch}."): value
            for key, value in self.metadata.items()
            if key.startswith(f"{arch}.")
        }
        if meta.get("expert_count"):
            problems.append(f"expert_count={short(meta['expert_count'])}: mixtures of experts")
        if meta.get("rope.scaling.attn_factor", 1.0) != 1.0:
            factor = short(meta["rope.scaling.attn_factor"])
            problems.append(f"rope.scaling.attn_factor={factor} (only 1.0)")
        heads: Any = meta.get("attention.head_count")
        width: Any = meta.get("embedding_length")
        sizes = isinstance(heads, int) and isinstance(width, int) and heads > 0
        hf: dict[str, Any] = {
            "model_type": arch,
            "vocab_size": self.shapes.get("token_embd.weight", (None,))[0],
            "hidden_size": width,
            "intermediate_size": meta.get("feed_forward_length"),
            "num_hidden_layers": meta.get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("attention.head_count_kv", heads),
            "head_dim": meta.get("attention.key_length", width // heads if sizes else None),
            "max_position_embeddings": meta.get("context_length"),
            "rope_theta": meta.get("rope.freq_base"),
            "rms_norm_eps": meta.get("attention.layer_norm_rms_epsilon"),
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "rope_scaling": _rope_scaling(meta),
        }
        if meta.get("attention.sliding_window"):
            # In these files a window is there only when it is used, as in Mistral's config.
            hf |= {"sliding_window": meta["attention.sliding_window"], "use_sliding_window": True}
            hf["max_window_layers"] = 0
            hf["model_type"] = "mistral" if arch == "llama" else arch
        for key, value in hf.items():
            if isinstance(value, list):
                problems.append(f"{key} differs from layer to layer")
        config = None
        try:
            known = {key: value for key, value in hf.items() if value is not None}
            config = config_from_hf(known, max_context=max_context)
        except ValueError as error:
            problems.append(str(error))
        if config is not None:
            rotary = meta.get("rope.dimension_count", config.head_dim)
            if rotary != config.head_dim:
                problems.append(f"rope.dimension_count={short(rotary)}: must be {config.head_dim}")
            if _ROPE_TENSOR in self.shapes:
                try:
                    config = self._with_llama3_rope(config)
                except ValueError as error:
                    problems.append(f"{_ROPE_TENSOR}: {error}")
        if problems or config is None:
            raise LoadError(str(self.path), problems)
        return config

    def _with_llama3_rope(self, config: ModelConfig) -> ModelConfig:
        """Finds the Llama 3 scaling whose frequencies are the ones in the file.

        The file holds frequency divisors only; their largest is the factor, and the other three
        constants are the same in every Llama 3.1, 3.2 and 3.3.
        """
        # Before anything of the size that the metadata claims is made.
        tensor, shape = self._tensors[_ROPE_TENSOR], (config.head_dim // 2,)
        if tensor.kind != gguf.GGMLQuantizationType.F32 or tensor.shape != shape:
            raise ValueError(f"{tensor.kind.name} {tensor.shape}: must be F32 {shape}")
        divisors = self.rows(_ROPE_TENSOR, 0, shape[0])
        if np.allclose(divisors, 1.0):
            return config
        if config.rope_scaling is not None:
            raise ValueError("beside rope.scaling.type: only one of them")
        scaling = RopeScaling(
            kind="llama3",
            factor=float(divisors.max()),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        )
        plain = rope_frequencies(config.head_dim, config.rope_theta, None)
        ours = rope_frequencies(config.head_dim, config.rope_theta, scaling)
        if not (divisors > 0).all() or not np.allclose(plain / divisors, ours, rtol=1e-4):
            raise ValueError("rotary frequencies of a kind other than Llama 3's")
        return dataclasses.replace(config, rope_scaling=scaling)


def _rope_scaling(meta: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type")
    if kind in (None, "none"):
        factor = meta.get("rope.scale_linear")  # the key of the oldest files
        return {"type": "linear", "factor": factor} if factor not in (None, 1.0) else None
    return {"type": kind, "factor": meta.get("rope.scaling.factor")}
