"""One layer's keys and values while a prompt goes through it, and the attention of its chunks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import zeros
from flexijax.cache.memory import nbytes
from flexijax.cache.observe import observe_all
from flexijax.cache.over_mesh import heads_in, made
from flexijax.models.config import AttentionShape
from flexijax.pallas_kernels import dispatch, placing
from flexijax.policies.base import Policy, PolicyState


@dataclasses.dataclass(frozen=True)
class PrefillSpec:
    """What reading a prompt is compiled for; a static argument of jitted functions.

    tokens: room for the longest prompt (S), see `room`. chunk, tail: tokens read at once, and of
    what is left at a prompt's end. tails: as many at most, else it is one more chunk; see `pieces`.
    key_lengths: how many of the S keys a chunk may
    attend to, ascending, S the last; more of them make less work and more programs. window: how
    many of its last queries are kept for policies to look at, at least one. observers: the policies
    that are shown every query.
    """

    shape: AttentionShape
    tokens: int
    chunk: int
    tail: int
    tails: int
    key_lengths: tuple[int, ...]
    dtype: str
    window: int
    observers: tuple[Policy, ...]
    implementation: str | None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens start .. start + size - 1 of a prompt, with the next ones up to its length to come."""

    start: int
    size: int
    keys: int  # that it attends to, of `PrefillSpec.key_lengths`


def pieces(spec: PrefillSpec, length: int, start: int = 0) -> Iterator[Piece]:
    """A prompt from token `start` on: chunks, then tails; the last one may be padded.

    Where they begin and end depends on the prompt alone, so that it is read by the same programs
    whatever runs beside it. start: a multiple of the chunk.

        chunk 256, tail 64, at most 2 tails, length 600: 0, 256, 512 and 576
                                             length 700: 0, 256, 512 to 768
    """
    while start < length:
        left = length - start
        # Tails follow one another: what is left behind one is no more than before.
        size = spec.chunk if left > spec.tails * spec.tail else spec.tail
        end = start + size
        yield Piece(start, size, next(keys for keys in spec.key_lengths if keys >= end))
        start = end


@heads_in(k=0, v=0, queries=1, observed=0)
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillKV:
    """What is kept of one layer of a prompt.

    Keys and values are flat over tokens: seen as pages (a mere reshape), XLA's CPU compiler copies
    an array that is written and read in one program, which took twice the memory and a tenth of the
    time.
    """

    k: jax.Array  # [K, H, S], channels before tokens as in dense groups
    v: jax.Array  # [K, S, H]
    queries: jax.Array  # [W, K, G, H], of the last W tokens so far
    observed: tuple[PolicyState, ...]  # per observer, leaves [K, ...]


def last_pieces(spec: PrefillSpec) -> Iterator[Piece]:
    """With those of the longest prompt, every size and number of keys that prompts are read in."""
    for start in range(0, spec.tokens, spec.chunk):
        yield from pieces(spec, min(start + spec.tails * spec.tail, spec.tokens), start)


def room(tokens: int, *, chunk: int, tail: int, tails: int) -> int:
    """Places for the pieces of every prompt of up to so many tokens: whole tails or chunks."""
    size = chunk if tokens % chunk > tails * tail else tail
    return -(-tokens // size) * size


def empty_prefill_kv(spec: PrefillSpec) -> PrefillKV:
    """Room for one layer of a prompt of up to `spec.tokens` tokens; over a mesh in shards."""
    return made(_empty, spec)


def _empty(spec: PrefillSpec) -> PrefillKV:
    shape = spec.shape
    heads, width = shape.num_kv_heads, shape.head_dim
    return PrefillKV(
        zeros((heads, width, spec.tokens), spec.dtype),
        zeros((heads, spec.tokens, width), spec.dtype),
        zeros((spec.window, heads, shape.group_size, width), spec.dtype),
        _nothing_observed(spec),
    )


def prefill_bytes(spec: PrefillSpec, *, width: int, layers: int = 1) -> int:
    """Device bytes of a prompt while it is read.

    width: bytes of what a token is between two layers. layers: of which keys and values are held.
    """
    return spec.tokens * width + layers * nbytes(abstract_prefill_kv(spec))


def abstract_prefill_kv(spec: PrefillSpec) -> PrefillKV:
    """The shapes of `empty_prefill_kv`, of one shard where the spec is of one."""
    with placing.over(None):
        return jax.eval_shape(functools.partial(_empty, spec))


def nothing_observed(spec: PrefillSpec) -> tuple[PolicyState, ...]:
    """What each observer knows of a layer before it has seen any query."""
    return made(_observed_alone, spec).observed


def _observed_alone(spec: PrefillSpec) -> PrefillKV:
    nothing: Any = None
    return PrefillKV(nothing, nothing, nothing, _nothing_observed(spec))


def _nothing_observed(spec: PrefillSpec) -> tuple[PolicyState, ...]:

    def state(policy: Policy) -> PolicyState:
        return jax.tree.map(
            lambda leaf: zeros((spec.shape.num_kv_heads, *leaf.shape), leaf.dtype) + leaf,
            policy.init_state(spec.tokens),
        )

    return tuple(state(policy) for policy in spec.observers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillState:
    """What goes through a layer in a prefill chunk."""

    kv: PrefillKV
    start: jax.Array  # int32[], tokens before this chunk
    last: jax.Array  # int32[], index in the chunk of its last token


@dataclasses.dataclass(frozen=True)
class PrefillAttention:
    """Causal attention of a chunk over the prompt so far; an `attention_fn`, hashable.

    The state is a `PrefillState`; a chunk's keys are written before they are attended. keys: how
    many of them are looked at. last_layer: in it only the chunk's last token attends, since all
    that a prompt leaves of it is that token's hidden state.
    """

    spec: PrefillSpec
    keys: int
    last_layer: bool

    def __call__(
        self, layer: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, state: PrefillState
    ) -> tuple[jax.Array, PrefillState]:
        """q [1, T, N, H], k and v [1, T, K, H] -> out [1, T, N, H]; layer: int32[]."""
        spec, shape, tokens = self.spec, self.spec.shape, q.shape[1]
        grouped = q.reshape(tokens, shape.num_kv_heads, shape.group_size, shape.head_dim)
        kv = state.kv
        new_k = k[0].astype(kv.k.dtype).transpose(1, 2, 0)
        new_v = v[0].astype(kv.v.dtype).transpose(1, 0, 2)
        keys = lax.dynamic_update_slice_in_dim(kv.k, new_k, state.start, axis=2)
        values = lax.dynamic_update_slice_in_dim(kv.v, new_v, state.start, axis=1)
        asked, start = grouped, state.start
        if self.last_layer:
            asked = lax.dynamic_slice_in_dim(grouped, state.last, 1)
            start = state.start + state.last
        out = dispatch.prefill_attention(
            asked,
            keys[:, :, : self.keys],
            values[:, : self.keys],
            start,
            scale=shape.scale,
            implementation=spec.implementation,
        )
        if self.last_layer:
            out = lax.dynamic_update_slice_in_dim(jnp.zeros_like(grouped), out, state.last, axis=0)
        # The window that ends at `last`, which the tokens before this chunk may have begun.
        known = jnp.concatenate([kv.queries[1:], grouped.astype(spec.dtype)])
        window = lax.dynamic_slice_in_dim(known, state.last, spec.window)
        at = jnp.arange(tokens, dtype=jnp.int32)
        positions = jnp.where(at <= state.last, state.start + at, -1)
        observed = tuple(
            observe_all(policy, seen, grouped, keys, values, positions, layer, scale=shape.scale)
            for policy, seen in zip(spec.observers, kv.observed, strict=True)
        )
        return out.reshape(q.shape), dataclasses.replace(
            state, kv=PrefillKV(keys, values, window, observed)
        )
