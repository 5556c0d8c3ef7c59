"""Measures which heads of a model retrieve: they look for what stood before on text that repeats.

The scores of RazorAttention (https://arxiv.org/abs/2407.15891, by third-party notes), on random
tokens that are repeated a few times: an echo head attends to where the token stood before, an
induction head to what followed it there.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexijax.models.config import AttentionShape
from flexijax.models.decoder import DecoderLike, Params
from flexijax.models.dense import dense_attend
from flexijax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class RetrievalScores:
    """Of each query head the share of its attention that goes there, mean over repeated tokens."""

    echo: np.ndarray  # float32[L, N], to the same token before
    induction: np.ndarray  # float32[L, N], to the token after the same token before
    num_kv_heads: int

    def kv_heads(
        self, *, induction: float = 0.14, echo: float = 0.01
    ) -> tuple[tuple[int, ...], ...]:
        """Per layer, the KV heads of which a query head is among these shares of the best.

        The shares are of all query heads of the model, the paper's by default, rounded up. As
        `RazorAttention(retrieval=...)` takes them.
        """
        best = np.zeros(self.echo.size, bool)
        for scores, share in ((self.induction, induction), (self.echo, echo)):
            order = np.argsort(-scores, axis=None, kind="stable")
            best[order[: math.ceil(share * scores.size)]] = True
        grouped = best.reshape(len(self.echo), self.num_kv_heads, -1).max(axis=2)
        return tuple(tuple(np.flatnonzero(grouped[at]).tolist()) for at in range(len(grouped)))


def measure_retrieval(
    lm: LanguageModel, *, length: int = 256, repeats: int = 4, seed: int = 0
) -> RetrievalScores:
    """Reads `length` random tokens `repeats` times over, by dense attention.

    Memory: the attention of one layer, (length x repeats)^2 x 4 bytes for each query head.
    Raises ValueError for fewer than 2 repeats or tokens, or more than the model can read.
    """
    if length < 2 or repeats < 2 or length * repeats > lm.max_context:
        raise ValueError(
            f"length={length} and repeats={repeats} must be at least 2, and together at most "
            f"{lm.max_context} tokens, the context of {lm.name}"
        )
    once = np.random.default_rng(seed).integers(0, lm.vocab_size, length)
    tokens = jnp.asarray(np.tile(once, repeats)[None], jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x, found = lm.decoder.embed(lm.params, tokens), []
    for layer, weights in enumerate(lm.decoder.layers(lm.params)):
        static = (lm.decoder, lm.attention, length)
        x, scores = _layer(*static, weights, jnp.int32(layer), x, positions)
        found.append(jax.device_get(scores))
    echo, induction = (np.stack(side) for side in zip(*found, strict=True))
    return RetrievalScores(echo, induction, lm.attention.num_kv_heads)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _layer(
    decoder: DecoderLike,
    shape: AttentionShape,
    length: int,
    weights: Params,
    layer: jax.Array,
    x: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer of the text: (x, (echo, induction) float32[N])."""
    attend = dense_attend(shape)

    def attention_fn(
        layer: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, state: None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out, _ = attend(0, q, k, v, None)
        return out, _shares(q[0], k[0], shape, length)

    return decoder.layer(weights, layer, x, positions, attention_fn, None)


def _shares(
    q: jax.Array, k: jax.Array, shape: AttentionShape, length: int
) -> tuple[jax.Array, jax.Array]:
    """q [T, N, H], k [T, K, H] of a text that repeats after `length`: see `RetrievalScores`."""
    place = jnp.arange(len(q))
    before = place[:, None] - place  # of query t and key s: t - s
    # The first time nothing has stood before, and nobody is asked.
    asked = (place >= length)[:, None] & (before > 0)
    echoes = asked & (before % length == 0)
    follows = asked & ((before + 1) % length == 0)

    def head(of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        of_q, of_k = (side.astype(jnp.float32) for side in of)
        logits = jnp.where(before >= 0, shape.scale * of_q @ of_k.T, -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1)
        queries = len(q) - length
        there = [jnp.where(where, weights, 0.0).sum() / queries for where in (echoes, follows)]
        return there[0], there[1]

    keys = jnp.repeat(k.swapaxes(0, 1), shape.group_size, axis=0)
    return lax.map(head, (q.swapaxes(0, 1), keys))
