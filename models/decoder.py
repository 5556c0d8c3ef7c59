"""One decoder for Llama, Mistral, Qwen2 and Qwen3, with the attention left to the caller."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx

from flexijax.models.config import ModelConfig
from flexijax.models.layers import Linear, RMSNorm, project, rope_tables, rotate

Params: TypeAlias = Any
# attend(layer, q [B, T, N, H], k [B, T, K, H], v [B, T, K, H], state) -> (out [B, T, N, H], state)
Attend: TypeAlias = Callable[[int, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class DecoderLike(Protocol):
    """What generation needs of a model: two pure methods; bring your own or use `Decoder`."""

    def hidden(
        self, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend, state: Any
    ) -> tuple[jax.Array, Any]:
        """tokens, positions int32[B, T] -> (x [B, T, D], state)."""
        ...

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """x [..., D] -> float32[..., V]."""
        ...


class Layer(nnx.Module):
    """One pre-norm decoder layer: attention by the plug, then SwiGLU."""

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
        layer: int,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        attend: Attend,
        state: Any,
    ) -> tuple[jax.Array, Any]:
        """x [B, T, D] -> (x [B, T, D], state)."""
        c = self.config
        qkv = self.qkv(self.attention_norm(x))
        qkv = qkv.reshape(*x.shape[:2], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        q, k, v = jnp.split(qkv, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        out, state = attend(layer, rotate(q, *rope), rotate(k, *rope), v, state)
        x = x + self.out(out.reshape(*x.shape[:2], c.num_heads * c.head_dim).astype(x.dtype))
        gate, up = jnp.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(nnx.silu(gate) * up), state


class Ends(nnx.Module):
    """What stands before the first layer and after the last: embedding, final norm, logits head."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs) -> None:
        shape = (config.vocab_size, config.hidden_size)
        table = jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param((table * 0.02).astype(dtype))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            head = jax.random.normal(rngs.params(), shape, jnp.float32)
            self.head = nnx.Param((head * config.hidden_size**-0.5).astype(dtype))
        self.tied = config.tie_embeddings

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, T] -> [B, T, D]."""
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip")

    def logits(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> float32[..., V]."""
        head = self.embedding[...] if self.tied else self.head[...]
        y = project(x.reshape(1, -1, x.shape[-1]), head)
        return y.reshape(*x.shape[:-1], head.shape[0])


@functools.cache
def _graphs(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """The weightless structure of `Ends` and of a `Layer`; all layers share one."""

    def graph(module_type):
        make = functools.partial(module_type, config, dtype=jnp.float32)
        return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))[0]

    return graph(Ends), graph(Layer)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random(
    module_type: type[Layer] | type[Ends], config: ModelConfig, dtype: Any, key: jax.Array
) -> Any:
    """Random weights of an `Ends` or a `Layer`, as a plain dict; one compilation for all layers."""
    module = module_type(config, dtype=dtype, rngs=nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(module))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The pure functions of one model; hashable, so it can be a static argument of `jax.jit`.

    params is a plain pytree, `{"ends": {...}, "layers": ({...}, ...)}`: arrays [out, in] for linear
    maps, [vocab, D] for embedding and head. The layers are separate subtrees, and the layer loop is
    Python's, because a scan over stacked weights copies each layer's slice (3.5 times slower decode
    on a CPU).
    """

    config: ModelConfig

    def hidden(
        self, params: Params, tokens: jax.Array, positions: jax.Array, attend: Attend, state: Any
    ) -> tuple[jax.Array, Any]:
        """Runs all layers and the final norm: (x [B, T, D] in the dtype of params, state).

        tokens and positions int32[B, T]; attend is called once per layer, in order, with rotated
        q and k; state goes through it untouched.
        """
        ends_graph, layer_graph = _graphs(self.config)
        ends = nnx.merge(ends_graph, params["ends"])
        rope = rope_tables(positions, self.config)
        x = ends.embed(tokens)
        for index, weights in enumerate(params["layers"]):
            x, state = nnx.merge(layer_graph, weights)(index, x, rope, attend, state)
        return ends.norm(x), state

    def logits(self, params: Params, x: jax.Array) -> jax.Array:
        """The scores of every next token: x [..., D] -> float32[..., V]."""
        return nnx.merge(_graphs(self.config)[0], params["ends"]).logits(x)

    def init(self, key: jax.Array, *, dtype: Any) -> Params:
        """Random params in dtype from one PRNG key, scaled so that activations stay near one."""
        keys = jax.random.split(key, self.config.num_layers + 1)
        layers = tuple(_random(Layer, self.config, dtype, k) for k in keys[1:])
        return {"ends": _random(Ends, self.config, dtype, keys[0]), "layers": layers}

    def abstract(self, *, dtype: Any) -> Params:
        """The tree of `init` as `jax.ShapeDtypeStruct`s, for compiling without weights."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0), dtype=dtype))
