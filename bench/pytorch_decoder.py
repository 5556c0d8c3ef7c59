"""A decoder layer of Llama, Mistral and Qwen in PyTorch, but for its attention.

Plain functions of tensors: `torch.compile` makes one program of them for all layers of one shape.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def project(
    weights: dict[str, Any],
    x: Tensor,
    shape: tuple[int, int, int],
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, D] -> q [B, N, T, H], k and v [B, K, T, H]; q and k rotated."""
    h = rms_norm(x, weights["attention_norm"], eps)

    def heads(name: str) -> Tensor:
        made = F.linear(h, weights[name], weights[f"{name}_bias"])
        made = made.view(*h.shape[:2], -1, shape[2])
        if (norm := weights.get(f"{name}_norm")) is not None:
            made = rms_norm(made, norm, eps)
        return made.transpose(1, 2)

    def rotate(y: Tensor) -> Tensor:
        one, two = y.chunk(2, dim=-1)
        return y * cos[:, None] + torch.cat([-two, one], dim=-1) * sin[:, None]

    return rotate(heads("q")), rotate(heads("k")), heads("v")


def after_attention(weights: dict[str, Any], x: Tensor, out: Tensor, eps: float) -> Tensor:
    """The rest of a layer: what attention gave [B, T, N * H] and the gated MLP are added to x."""
    x = x + F.linear(out, weights["o"])
    h = rms_norm(x, weights["mlp_norm"], eps)
    return x + F.linear(
        F.silu(F.linear(h, weights["gate"])) * F.linear(h, weights["up"]), weights["down"]
    )


def rms_norm(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """x over its root mean square, times scale."""
    return F.rms_norm(x, x.shape[-1:], scale, eps)


def weights_of(layer: Any) -> dict[str, Any]:
    """Of a decoder layer of transformers."""
    attention, mlp, found = layer.self_attn, layer.mlp, {}
    for name in "qkv":
        linear = getattr(attention, f"{name}_proj")
        found |= {name: linear.weight, f"{name}_bias": linear.bias}
        if hasattr(attention, f"{name}_norm"):
            found[f"{name}_norm"] = getattr(attention, f"{name}_norm").weight
    norms = {
        "attention_norm": layer.input_layernorm.weight,
        "mlp_norm": layer.post_attention_layernorm.weight,
    }
    products = {name: getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")}
    made = found | norms | products | {"o": attention.o_proj.weight}
    return {name: None if one is None else one.detach() for name, one in made.items()}
