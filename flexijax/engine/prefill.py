"""Reading a prompt: fixed-size chunks over dense keys and values, then a commit layer by layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from flexijax.cache.arrays import Prompt
from flexijax.cache.cache import LayerCache, kind
from flexijax.cache.layout import CacheLayout, GroupProgram
from flexijax.cache.prefill_kv import PrefillAttention, PrefillKV, PrefillSpec, PrefillState
from flexijax.models.decoder import DecoderLike, Params


@dataclasses.dataclass(frozen=True)
class PrefillProgram:
    """The static part of `prefill_chunk`."""

    decoder: DecoderLike
    spec: PrefillSpec


def prefill_chunk(
    program: PrefillProgram,
    params: Params,
    tokens: jax.Array,
    start: jax.Array,
    last: jax.Array,
    kv: PrefillKV,
) -> tuple[PrefillKV, jax.Array]:
    """Runs a chunk of one prompt.

    tokens: int32[1, C], what stands behind index `last` is padding. start: int32[], tokens before
    the chunk. last: int32[]. kv: donated.
    Returns the new kv and the last token's hidden state [1, D].
    """
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    attention_fn = PrefillAttention(program.spec)
    state = PrefillState(kv, start, last)
    x, state = program.decoder.hidden(params, tokens, positions, attention_fn, state, only=last)
    if x.shape[:2] != (1, 1):
        raise ValueError(f"the decoder's hidden() gave x {x.shape} for one token: see `only`")
    return state.kv, x[:, 0]


def commit_layer(
    programs: tuple[GroupProgram, ...],
    layer_cache: LayerCache,
    prompt: Prompt,
    heads: tuple[jax.Array | None, ...],
) -> LayerCache:
    """Moves one layer's share of a prompt into its row of the cache.

    layer_cache: donated. prompt: of all heads of the layer. heads: of each group, int32[K_g], as
    arrays, so that layers with groups of equal sizes share a program; None for all of them.
    """
    groups, hosts, counts = [], [], []
    for program, group, host, stats, mine in zip(
        programs, layer_cache.groups, layer_cache.host, layer_cache.stats, heads, strict=True
    ):
        made = kind(program.group).commit(program, group, host, stats, _of_heads(prompt, mine))
        for parts, part in zip((groups, hosts, counts), made, strict=True):
            parts.append(part)
    return LayerCache(tuple(groups), tuple(hosts), tuple(counts))


def head_arrays(layout: CacheLayout, layer: int) -> tuple[jax.Array | None, ...]:
    """The heads of each group of a layer, as `commit_layer` takes them."""
    every = tuple(range(layout.sizes.shape.num_kv_heads))
    return tuple(
        None if group.heads == every else jnp.asarray(group.heads, jnp.int32)
        for group in layout.groups[layer]
    )


def _of_heads(prompt: Prompt, heads: jax.Array | None) -> Prompt:
    """The prompt as a group of those heads needs it."""
    if heads is None:
        return prompt
    return dataclasses.replace(
        prompt,
        k=prompt.k[heads],
        v=prompt.v[heads],
        queries=prompt.queries[:, heads],
        observed=jax.tree.map(lambda leaf: leaf[heads], prompt.observed),
    )
