"""What our methods keep against kvpress, on the same tensors: `python -m bench.kvpress_ranks`.

kvpress (https://github.com/NVIDIA/kvpress) implements published methods in PyTorch. A small Llama
of random weights reads a random text; its queries and keys after RoPE go to our policy, what its
attention module saw goes to the press, and both say which tokens of each KV head are best. Scores
are brought to one form first, exactly, where the two define them differently:

    StreamingLLM     1 where a token stays, 0 where it does not.
    SnapKV           equal as they are; the window, kept by rule, is left out of the difference.
    H2O              ObservedAttentionPress has the mean over the S - t queries that see token t and
                     over the G query heads; H2O the sum over both, so kvpress' score times
                     G (S - t). Its newest tokens are ours alone: they stay by rule on both sides.

Ends with 1 where a score differs by more than `TOLERANCE` or another token is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from bench.timing import table
from flexijax.cache.observe import window_of
from flexijax.policies.base import HeadGroup, Policy, Tier, Tokens
from flexijax.policies.h2o import H2O
from flexijax.policies.snapkv import SnapKV
from flexijax.policies.streaming_llm import StreamingLLM

# Both sides are float32 and sum in different orders.
TOLERANCE = 1e-5
_TINY = float(np.finfo(np.float32).tiny)
# Tokens of the text and of the budget, above SnapKV's window.
SIZES = ((97, 80), (300, 128), (513, 160))
COLUMNS = ("method", "press", "tokens", "kept", "heads", "max_difference", "same_kept")
# Ours and theirs float64[K, S], of one layer after another.
Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
INSTALL = (
    "install it beside flexijax into an environment of its own, since it asks for an older "
    "transformers: python -m pip install kvpress"
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One attention layer that has read a text of S tokens."""

    module: Any  # torch
    hidden: Any  # torch [1, S, D]
    keys: Any  # torch [1, K, S, H], rotated
    values: Any  # torch [1, K, S, H]
    weights: Any  # torch [1, N, S, S], after the softmax
    rope: Any  # cosines and sines, torch [1, S, H] each
    q: np.ndarray  # float32[K, G, S, H], rotated
    k: np.ndarray  # float32[K, S, H], rotated
    scale: float

    def score(self, press: Any, *, observed: bool) -> np.ndarray:
        """The press' score of each token, float64[K, S]. observed: it is given the weights."""
        weights = self.weights if observed else None
        rope = {"position_embeddings": self.rope}
        found = press.score(self.module, self.hidden, self.keys, self.values, weights, rope)
        return found[0].double().numpy()


def read_text(length: int, *, seed: int) -> list[Layer]:
    """A Llama of two layers, G = 3 and random weights, eager, after a random text of S tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        # Ten times the usual one: with it attention would be even, and every rank a tie.
        initializer_range=0.2,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # the one that tells its weights
    layers: list[Layer] = []

    def remember(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        kept = kwargs["past_key_values"].layers[module.layer_idx]
        q = module.q_proj(hidden).view(1, length, -1, module.head_dim).transpose(1, 2)
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        q = q[0].view(config.num_key_value_heads, -1, length, module.head_dim).numpy()
        layers.append(
            Layer(
                module=module,
                hidden=hidden,
                keys=kept.keys,
                values=kept.values,
                weights=output[1],
                rope=(cos, sin),
                q=q,
                k=kept.keys[0].numpy(),
                scale=module.scaling,
            )
        )

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(remember, with_kwargs=True)
    model(torch.randint(config.vocab_size, (1, length)), use_cache=True)
    return layers


def ranks(policy: Policy, layer: Layer, *, room: int) -> np.ndarray:
    """Our rank of each token after the text, float64[K, S]."""
    group = HeadGroup((0,), (Tier(room),), unit="token")
    length = layer.k.shape[1]
    observed = length if policy.prompt_window is None else policy.prompt_window
    position = jnp.arange(length, dtype=jnp.int32)
    q_position = position[length - observed :]
    found = []
    for q, k in zip(layer.q[:, :, length - observed :], layer.k, strict=True):
        q, k = jnp.asarray(q), jnp.asarray(k)
        tokens = Tokens(k, k, position, jnp.int32(length), jnp.int32(0))
        window = window_of(q.swapaxes(0, 1), q_position, k.T, position, scale=layer.scale)
        state = policy.observe(policy.init_state(length), window, tokens)
        found.append(np.asarray(policy.rank_tokens(group, state, tokens), np.float64))
    return np.stack(found)


def best(scores: np.ndarray, room: int) -> np.ndarray:
    """bool[K, S]: the `room` greatest of each head."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :room]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


def compare(name: str, ours: np.ndarray, theirs: np.ndarray, *, room: int) -> dict[str, Any]:
    """One row: ours and theirs float64[K, S], in one form, +inf for what stays by rule."""
    ranked = np.isfinite(ours)
    expected = theirs[ranked]
    difference = np.abs(ours[ranked] - expected) / np.maximum(np.abs(expected), _TINY)
    return {
        "method": name,
        "tokens": ours.shape[1],
        "kept": room,
        "heads": ours.shape[0],
        "max_difference": float(difference.max()),
        "same_kept": bool((best(ours, room) == best(theirs, room)).all()),
    }


def measure(kvpress: Any, *, length: int, room: int, seed: int) -> list[dict[str, Any]]:
    """A row for each method over all heads and layers of one text."""
    layers = read_text(length, seed=seed)
    return [
        {"press": press} | compare(name, *map(np.concatenate, zip(*pairs, strict=True)), room=room)
        for name, press, pairs in (
            ("streaming_llm", "StreamingLLMPress", _streaming(kvpress, layers, length, room)),
            ("snapkv", "SnapKVPress", _snapkv(kvpress, layers, room)),
            ("h2o", "ObservedAttentionPress", _h2o(kvpress, layers, length, room)),
        )
    ]


def _streaming(kvpress: Any, layers: list[Layer], length: int, room: int) -> Pairs:
    """The press takes a share, of which it keeps the whole tokens; half a token beyond is safe."""
    policy = StreamingLLM()
    press = kvpress.StreamingLLMPress(1 - (room + 0.5) / length, n_sink=policy.sinks)
    for layer in layers:
        ours = best(ranks(policy, layer, room=room), room).astype(np.float64)
        yield ours, layer.score(press, observed=False)


def _snapkv(kvpress: Any, layers: list[Layer], room: int) -> Pairs:
    """Not given the weights, the press computes those of the window as a flash kernel has it do."""
    policy = SnapKV()
    press = kvpress.SnapKVPress(window_size=policy.window, kernel_size=policy.kernel)
    for layer in layers:
        yield ranks(policy, layer, room=room), layer.score(press, observed=False)


def _h2o(kvpress: Any, layers: list[Layer], length: int, room: int) -> Pairs:
    policy, press = H2O(), kvpress.ObservedAttentionPress()
    for layer in layers:
        ours, mean = ranks(policy, layer, room=room), layer.score(press, observed=True)
        summed = mean * layer.q.shape[1] * np.arange(length, 0, -1)
        yield ours, np.where(np.isposinf(ours), np.inf, summed)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kvpress_ranks", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the text")
    args = parser.parse_args(argv)
    try:
        kvpress = importlib.import_module("kvpress")
    except ImportError as error:
        print(f"bench.kvpress_ranks needs kvpress ({error}): {INSTALL}", file=sys.stderr)
        return 2
    rows = [
        row
        for length, room in SIZES
        for row in measure(kvpress, length=length, room=room, seed=args.seed)
    ]
    print(table([row | {"same_kept": _said(row["same_kept"])} for row in rows], COLUMNS))
    # Not `> TOLERANCE`, which no NaN is.
    alike = all(row["max_difference"] <= TOLERANCE and row["same_kept"] for row in rows)
    return 0 if alike else 1


def _said(same: bool) -> str:
    return "yes" if same else "no"


if __name__ == "__main__":
    sys.exit(main())
