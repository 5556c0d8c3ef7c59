"""One decoder for Llama, Mistral, Qwen2 and Qwen3, with the attention left to the caller."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flexijax.models.config import ModelConfig
from flexijax.models.layers import Linear, RMSNorm, over_devices, project, rope_tables, rotate

Params: TypeAlias = Any
# attention_fn(layer, q [B, T, N, H], k [B, T, K, H], v [B, T, K, H], state)
# -> (out [B, T, N, H], state); layer is an int in a decode step, int32[] while a prompt is read
AttentionFn: TypeAlias = Callable[
    [Any, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]
]


class DecoderLike(Protocol):
    """What generation needs of a model, as pure methods: derive your own from it.

    A prompt is read layer by layer, all of it through one before any of it through the next, so
    that one layer's keys and values stand in memory outside of the cache.
    """

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """What goes into the first layer: int32[B, T] -> x [B, T, D]."""
        ...

    def layers(self, params: Params) -> Sequence[Params]:
        """The weights of each layer. Layers of one structure are compiled once."""
        ...

    def layer(
        self,
        weights: Params,
        layer: int | jax.Array,
        x: jax.Array,
        positions: jax.Array,
        attention_fn: AttentionFn,
        state: Any,
        *,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] at positions int32[B, T] -> (x [B, T, D], state), by one of `layers`.

        attention_fn: to be called once, with rotated q and k; `layer` is handed on to it. only:
        int32[], the one token of T whose x is wanted, as [B, 1, D]: attention_fn then gives no more
        than that token's out.
        """
        ...

    def norm(self, params: Params, x: jax.Array) -> jax.Array:
        """What follows the last layer: x [..., D] -> [..., D]."""
        ...

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """The scores of every next token, of x that `norm` gave: [..., D] -> float32[..., V]."""
        ...

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        attention_fn: AttentionFn,
        state: Any,
    ) -> tuple[jax.Array, Any]:
        """All of it but the logits: tokens, positions int32[B, T] -> (x [B, T, D], state).

        What a decode step runs; attention_fn is called once per layer, in order.
        """
        x = self.embed(params, tokens)
        for index, weights in enumerate(self.layers(params)):
            x, state = self.layer(weights, index, x, positions, attention_fn, state)
        return self.norm(params, x), state


class Layer(nnx.Module):
    """One pre-norm decoder layer: attention by attention_fn, then SwiGLU."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> None:
        c = config
        self.config = config
        norm = functools.partial(RMSNorm, eps=c.rms_norm_eps, dtype=dtype)
        linear = functools.partial(Linear, dtype=dtype, rngs=rngs)
        # q, k, v are one kernel, gate and up another: three products fewer a layer, 1.1 times as
        # fast on a CPU at one row and at four (measured as in `project`).
        self.attention_norm = norm(c.hidden_size)
        qkv_size = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        self.qkv = linear(c.hidden_size, qkv_size, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm = norm(c.head_dim)
            self.k_norm = norm(c.head_dim)
        self.out = linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.mlp_norm = norm(c.hidden_size)
        self.gate_up = linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = linear(c.intermediate_size, c.hidden_size, bias=False)

    def __call__(
        self,
        layer: int | jax.Array,
        x: jax.Array,
        parts: jax.Array | None,
        rope: tuple[jax.Array, jax.Array],
        attention_fn: AttentionFn,
        state: Any,
        *,
        only: jax.Array | None = None,
        axis: str | None = None,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """x [B, T, D] -> (x, parts, state); with `only` named, of that token alone: [B, 1, D].

        parts: float32[S, B, T, D], what the layer adds to x, in parts that are added up with the
        next norm: as given of the layer before, None for the first, as returned of this one. axis:
        see `Decoder`.
        """
        c = self.config
        x, normed = self.attention_norm.after_sum(x, parts)
        qkv = self.qkv(normed)
        qkv = qkv.reshape(*x.shape[:2], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out, state = attention_fn(layer, rotate(q, *rope), rotate(k, *rope), v, state)
        out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim).astype(x.dtype)
        if only is not None:
            x, out = (lax.dynamic_slice_in_dim(each, only, 1, axis=1) for each in (x, out))
        x, normed = self.mlp_norm.after_sum(x, over_devices(self.out.parts(out), axis))
        gate, up = jnp.split(self.gate_up(normed), 2, axis=-1)
        return x, over_devices(self.down.parts(nnx.silu(gate) * up), axis), state


class Embedding(nnx.Module):
    """Token id to vector; a tied model's logits head too, as Flax's `nnx.Embed`."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        table = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param((table * 0.02).astype(dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32[B, T] -> [B, T, D]."""
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")

    def attend(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> float32[..., V], its product with every token's vector."""
        return _logits(x, self.embedding[...])


class LMHead(nnx.Module):
    """The logits of an untied model."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        kernel = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param((kernel * config.hidden_size**-0.5).astype(dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> float32[..., V]."""
        return _logits(x, self.kernel[...])


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    y = project(x.reshape(1, -1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[0])


def _modules(config: ModelConfig, dtype: Any, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
    """What stands before the first layer and after the last, by its name in params."""
    modules: dict[str, nnx.Module] = {
        "embed": Embedding(config, dtype=dtype, rngs=rngs),
        "norm": RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype),
    }
    if not config.tie_embeddings:
        modules["lm_head"] = LMHead(config, dtype=dtype, rngs=rngs)
    return modules


@functools.cache
def _graphs(config: ModelConfig) -> dict[str, nnx.GraphDef]:
    """The weightless structure of each module by name; all layers share that of "layer"."""

    def make() -> dict[str, nnx.Module]:
        layer = Layer(config, dtype=jnp.float32, rngs=nnx.Rngs(0))
        return {"layer": layer, **_modules(config, jnp.float32, nnx.Rngs(0))}

    return {name: nnx.split(module)[0] for name, module in nnx.eval_shape(make).items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_layer(config: ModelConfig, dtype: Any, key: jax.Array) -> Any:
    """Random weights of a layer, as a plain dict; one compilation for all layers."""
    return nnx.to_pure_dict(nnx.state(Layer(config, dtype=dtype, rngs=nnx.Rngs(key))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _random_rest(config: ModelConfig, dtype: Any, key: jax.Array) -> Any:
    """Random weights of all that is no layer, as plain dicts."""
    modules = _modules(config, dtype, nnx.Rngs(key))
    return {name: nnx.to_pure_dict(nnx.state(module)) for name, module in modules.items()}


@dataclasses.dataclass(frozen=True)
class Decoder(DecoderLike):
    """The pure functions of one model; hashable, so it can be a static argument of `jax.jit`.

    params is a plain pytree, `{"embed": {"embedding"}, "layers": ({...}, ...), "norm": {"scale"},
    "lm_head": {"kernel"}}`, without lm_head where the embedding is the head: kernels [out, in], the
    embedding [V, D]. The layers are separate subtrees, and a step's layer loop is Python's, because
    a scan over stacked weights copies each layer's slice (3.5 times slower decode on a CPU).

    axis: the name of a mesh's axis where this is one device's part of a model, see `shards.py`;
    config is that of the part then.
    """

    config: ModelConfig
    axis: str | None = None

    def embed(self, params: Params, tokens: jax.Array) -> jax.Array:
        """See `DecoderLike.embed`."""
        return nnx.merge(_graphs(self.config)["embed"], params["embed"])(tokens)

    def layers(self, params: Params) -> Sequence[Params]:
        """See `DecoderLike.layers`."""
        return params["layers"]

    def layer(
        self,
        weights: Params,
        layer: int | jax.Array,
        x: jax.Array,
        positions: jax.Array,
        attention_fn: AttentionFn,
        state: Any,
        *,
        only: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """See `DecoderLike.layer`."""
        rope = rope_tables(positions, self.config)
        made = nnx.merge(_graphs(self.config)["layer"], weights)
        x, parts, state = made(layer, x, None, rope, attention_fn, state, only=only, axis=self.axis)
        return x + parts.sum(0).astype(x.dtype), state

    def norm(self, params: Params, x: jax.Array) -> jax.Array:
        """See `DecoderLike.norm`."""
        return nnx.merge(_graphs(self.config)["norm"], params["norm"])(x)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        attention_fn: AttentionFn,
        state: Any,
    ) -> tuple[jax.Array, Any]:
        """See `DecoderLike.hidden`: x in the dtype of params.

        What a layer adds is added up in the next one's norm, which is one kernel less a layer.
        """
        graphs = _graphs(self.config)
        rope = rope_tables(positions, self.config)
        x, parts = self.embed(params, tokens), None
        for index, weights in enumerate(params["layers"]):
            layer = nnx.merge(graphs["layer"], weights)
            x, parts, state = layer(index, x, parts, rope, attention_fn, state, axis=self.axis)
        return nnx.merge(graphs["norm"], params["norm"]).after_sum(x, parts)[1], state

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """See `DecoderLike.logits`."""
        graphs = _graphs(self.config)
        if self.config.tie_embeddings:
            return nnx.merge(graphs["embed"], params["embed"]).attend(x)
        scores = nnx.merge(graphs["lm_head"], params["lm_head"])(x)
        if self.axis is None:
            return scores
        # Of each device those of some tokens, the last filled up.
        every = lax.all_gather(scores, self.axis, axis=scores.ndim - 1, tiled=True)
        return every[..., : self.config.vocab_size]

    def init(self, key: jax.Array, *, dtype: Any) -> Params:
        """Random params in dtype from one PRNG key, scaled so that activations stay near one."""
        keys = jax.random.split(key, self.config.num_layers + 1)
        layers = tuple(_random_layer(self.config, dtype, k) for k in keys[1:])
        return {**_random_rest(self.config, dtype, keys[0]), "layers": layers}

    def abstract(self, *, dtype: Any) -> Params:
        """The tree of `init` as `jax.ShapeDtypeStruct`s, for compiling without weights."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        rest = jax.eval_shape(functools.partial(_random_rest, self.config, dtype), key)
        layer = jax.eval_shape(functools.partial(_random_layer, self.config, dtype), key)
        return {**rest, "layers": (layer,) * self.config.num_layers}
