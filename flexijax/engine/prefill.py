"""Reading a prompt: chunk by chunk through one layer after the other, each committed as it ends."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flexijax.cache.arrays import Prompt
from flexijax.cache.cache import LayerCache, kind
from flexijax.cache.layout import CacheLayout, GroupProgram
from flexijax.cache.prefill_kv import PrefillAttention, PrefillKV, PrefillSpec, PrefillState
from flexijax.models.decoder import DecoderLike, Params
from flexijax.pallas_kernels import platform
from flexijax.policies.base import PolicyState


@dataclasses.dataclass(frozen=True)
class PrefillProgram:
    """The static part of `prefill_chunk`, the same for all layers. size, keys: of a `Piece`."""

    decoder: DecoderLike
    spec: PrefillSpec
    size: int
    keys: int


def embed_prompt(decoder: DecoderLike, params: Params, tokens: jax.Array) -> jax.Array:
    """A whole prompt's int32[S], padded, as what goes into the first layer: [S, D]."""
    return decoder.embed(params, tokens[None])[0]


def prefill_chunk(
    program: PrefillProgram,
    weights: Params,
    layer: jax.Array,
    x: jax.Array,
    start: jax.Array,
    last: jax.Array,
    kv: PrefillKV,
) -> tuple[jax.Array, PrefillKV]:
    """Runs a chunk of one prompt through a layer.

    weights: of the layer; layer: int32[]. x: [S, D], donated; its tokens from int32[] `start` on
    are replaced by what comes out. last: int32[], index in the chunk of its last token, behind
    which stands padding. kv: of the layer, donated.
    """
    piece, positions = _piece(program, x, start)
    attention_fn = PrefillAttention(program.spec, program.keys, last_layer=False)
    state = PrefillState(kv, start, last)
    made, state = program.decoder.layer(weights, layer, piece, positions, attention_fn, state)
    return lax.dynamic_update_slice_in_dim(x, made[0].astype(x.dtype), start, axis=0), state.kv


def prefill_last_layer(
    program: PrefillProgram,
    weights: Params,
    layer: jax.Array,
    x: jax.Array,
    start: jax.Array,
    last: jax.Array,
    kv: PrefillKV,
) -> tuple[jax.Array, PrefillKV]:
    """As `prefill_chunk` in the last layer, of which one token's hidden state is wanted: [1, D].

    x is not donated; kv is.
    """
    piece, positions = _piece(program, x, start)
    attention_fn = PrefillAttention(program.spec, program.keys, last_layer=True)
    state = PrefillState(kv, start, last)
    made, state = program.decoder.layer(
        weights, layer, piece, positions, attention_fn, state, only=last
    )
    if made.shape[:2] != (1, 1):
        raise ValueError(f"the decoder's layer() gave x {made.shape} for one token: see `only`")
    return made[:, 0], state.kv


def _piece(program: PrefillProgram, x: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of x [S, D] the program's tokens [1, T, D], and their positions int32[1, T]."""
    piece = lax.dynamic_slice_in_dim(x, start, program.size)
    return piece[None], start + jnp.arange(program.size, dtype=jnp.int32)[None]


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
    # A row may have less room than prompts are read in, whose last piece is padded.
    room = programs[0].sizes.max_tokens
    if room < prompt.k.shape[2]:
        prompt = dataclasses.replace(prompt, k=prompt.k[:, :, :room], v=prompt.v[:, :room])
        if isinstance(seen := prompt.observed, PolicyState):
            tokens = jax.tree.map(lambda leaf: leaf[:, :room], seen.tokens)
            prompt = dataclasses.replace(prompt, observed=PolicyState(tokens, seen.head))
    groups, hosts, counts = [], [], []
    for program, group, host, stats, mine in zip(
        programs, layer_cache.groups, layer_cache.host, layer_cache.stats, heads, strict=True
    ):
        made = kind(program.group).commit(program, group, host, stats, _of_heads(prompt, mine))
        for parts, part in zip((groups, hosts, counts), made, strict=True):
            parts.append(part)
    return LayerCache(tuple(groups), tuple(hosts), tuple(counts))


def load_prefix(
    programs: tuple[GroupProgram, ...],
    layer_cache: LayerCache,
    heads: tuple[jax.Array | None, ...],
    blocks: jax.Array,
    length: jax.Array,
    kv: PrefillKV,
) -> PrefillKV:
    """The first tokens of a prompt from both tiers, where a chunk of one layer attends to them.

    blocks: int32[P]; they hold the first `length` int32[] tokens, whole pages. kv: donated.
    """
    k, v = kv.k, kv.v
    for program, group, host, mine in zip(
        programs, layer_cache.groups, layer_cache.host, heads, strict=True
    ):
        pages = lax.div(length, program.sizes.page_size)
        of_group = kind(program.group).read_pages(program, group, host, blocks, pages)
        room, rows = program.sizes.max_tokens, slice(None) if mine is None else mine
        if group.first is not None:
            there = (group.first[0] >= 0)[:, None, None]
            known = (k[rows, :, :room], v[rows, :room])
            of_group = tuple(jnp.where(there, *of) for of in zip(of_group, known, strict=True))
        k = k.at[rows, :, :room].set(of_group[0])
        v = v.at[rows, :room].set(of_group[1])
    return dataclasses.replace(kv, k=k, v=v)


def head_arrays(layout: CacheLayout, layer: int) -> tuple[jax.Array | None, ...]:
    """The heads of each group of a layer, as `commit_layer` takes them."""
    every = tuple(range(layout.sizes.shape.num_kv_heads))
    return tuple(
        None if group.heads == every else platform.put(np.array(group.heads, np.int32))
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
