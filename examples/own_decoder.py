"""A decoder that is not ours, in Flax NNX, generating through the cache.

It has what ours lacks: LayerNorm with bias, attention and MLP in parallel, rotary embedding on half
of each head. All that the cache asks for is a call to `attention_fn` in every layer. Weights are
random, so the tokens mean nothing; what counts is that every policy agrees with the model's own
attention.

    python -m examples.own_decoder
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flexijax
from flexijax.models.config import AttentionShape
from flexijax.models.decoder import DecoderLike

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 2, 4, 2, 16, 64, 101


class Block(nnx.Module):
    """Knows nothing of caches: it is handed an attention function and a state to carry along."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.q = nnx.Linear(WIDTH, HEADS * HEAD_DIM, rngs=rngs)
        self.k = nnx.Linear(WIDTH, KV_HEADS * HEAD_DIM, rngs=rngs)
        self.v = nnx.Linear(WIDTH, KV_HEADS * HEAD_DIM, rngs=rngs)
        self.out = nnx.Linear(HEADS * HEAD_DIM, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, layer, x: jax.Array, positions: jax.Array, attention_fn, state):
        h = self.norm(x)
        q = rotate(self.q(h).reshape(*h.shape[:2], HEADS, HEAD_DIM), positions)
        k = rotate(self.k(h).reshape(*h.shape[:2], KV_HEADS, HEAD_DIM), positions)
        v = self.v(h).reshape(*h.shape[:2], KV_HEADS, HEAD_DIM)
        out, state = attention_fn(layer, q, k, v, state)
        out = self.out(out.reshape(*h.shape[:2], -1))
        return x + out + self.down(nnx.gelu(self.up(h))), state


class Transformer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding on the first half of each head. x [B, T, heads, H], positions [B, T]."""
    rotated, kept = jnp.split(x, 2, axis=-1)
    pairs = rotated.shape[-1] // 2
    frequency = 1000.0 ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angle = (positions.astype(jnp.float32)[..., None] * frequency)[:, :, None]  # [B, T, 1, pairs]
    a, b = jnp.split(rotated, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, kept], axis=-1)


@dataclasses.dataclass(frozen=True)
class Adapter(DecoderLike):
    """What `generate` calls, over the static parts of the module and of one of its blocks."""

    graph: nnx.GraphDef
    block: nnx.GraphDef

    def embed(self, params, tokens):
        """See `DecoderLike.embed`; the others likewise."""
        return nnx.merge(self.graph, params).embedding(tokens)

    def layers(self, params):
        return [params["blocks"][layer] for layer in range(LAYERS)]

    def layer(self, weights, layer, x, positions, attention_fn, state, *, only=None):
        block = nnx.merge(self.block, weights)
        x, state = block(layer, x, positions, attention_fn, state)
        return x if only is None else x[:, only][:, None], state

    def norm(self, params, x):
        return nnx.merge(self.graph, params).norm(x)

    def logits(self, params, x):
        return nnx.merge(self.graph, params).head(x)


def language_model(*, seed: int = 0) -> flexijax.LanguageModel:
    """The model as `generate` takes it; it has no tokenizer, so prompts are token ids."""
    model = Transformer(rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)
    return flexijax.LanguageModel(
        name="own decoder",
        decoder=Adapter(graph, nnx.split(model.blocks[0])[0]),
        params=params,
        attention=AttentionShape(
            num_layers=LAYERS,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            scale=HEAD_DIM**-0.5,
        ),
        vocab_size=VOCAB,
        max_context=4096,
        dtype=jnp.dtype("float32"),
        tokenizer=None,
        fingerprint="own decoder, 2 layers",
    )


def attend_densely(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, state):
    """Plain causal attention, an `attention_fn` without a cache: the yardstick."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) * HEAD_DIM**-0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v), state


def greedy_densely(lm: flexijax.LanguageModel, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens, the whole text read anew for each."""

    @jax.jit
    def next_token(tokens: jax.Array, length: jax.Array) -> jax.Array:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x, _ = lm.decoder.hidden(lm.params, tokens, positions, attend_densely, None)
        return jnp.argmax(lm.decoder.logits(lm.params, x[0, length - 1]))

    text = np.zeros((1, len(prompt) + count), np.int32)
    text[0, : len(prompt)] = prompt
    for length in range(len(prompt), text.shape[1]):
        text[0, length] = next_token(text, length)
    return text[0, len(prompt) :].tolist()


def main() -> None:
    lm = language_model()
    prompt = np.random.default_rng(0).integers(0, VOCAB, 600).tolist()
    # Measured with `flexijax profile` for a model that is worth it; here one head a layer.
    profile = flexijax.HeadProfile(
        model=lm.name,
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        unstable=tuple((layer, layer % KV_HEADS) for layer in range(LAYERS)),
        page_size=16,
        budget_pages=8,
        source="invented for this example",
    )
    dense = greedy_densely(lm, prompt, 32)
    print(f"own attention       {dense}")
    for policy, budget in (("full", 1024), ("flexi", 1024), ("flexi", 128)):
        cache = flexijax.CacheConfig(policy=policy, budget_tokens=budget, profile=profile)
        out = flexijax.generate(lm, [prompt], max_new_tokens=32, cache=cache)[0]
        same = sum(a == b for a, b in zip(out.token_ids, dense, strict=True))
        share = out.metrics.device_kv_bytes / out.metrics.full_kv_bytes
        print(f"{policy:5} budget {budget:4}: {same} of 32 tokens agree, {share:.0%} of full KV")


if __name__ == "__main__":
    main()
