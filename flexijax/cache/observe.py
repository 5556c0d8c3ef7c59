"""What a policy is shown: queries of a head, with their logits over the tokens it holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.cache.arrays import Chunk, Prompt, empty_state
from flexijax.cache.layout import GroupProgram
from flexijax.pallas_kernels.tiling import largest_divisor
from flexijax.policies.base import Policy, PolicyState, Tokens, Window

# Queries observed at once where all of a prompt are: their logits over 8 thousand tokens take 4 MB
# for each query head.
_BLOCK = 128


def window_of(
    q: jax.Array, q_position: jax.Array, k: jax.Array, position: jax.Array, *, scale: float
) -> Window:
    """q [W, G, H] at int32[W], -1 for none; k [H, T] at int32[T], -1 for none."""
    q = q.swapaxes(0, 1)
    logits = scale * jnp.einsum("GWH,HT->GWT", q, k, preferred_element_type=jnp.float32)
    sees = (position >= 0) & (position <= q_position[:, None]) & (q_position >= 0)[:, None]
    logits = jnp.where(sees, logits, -jnp.inf)
    return Window(q, q_position, logits, jax.nn.logsumexp(logits, axis=-1))


def observe_chunk(
    program: GroupProgram,
    state: PolicyState,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    chunk: Chunk,
) -> PolicyState:
    """The states [B, K, ...] after a chunk's queries; k [B, K, H, T], v [B, K, T, H].

    position: int32[B, K, T], -1 for none.
    """
    assert chunk.queries is not None
    steps = jnp.arange(chunk.queries.shape[0], dtype=jnp.int32)
    q_position = chunk.before[:, None] + steps  # [B, W]
    q_position = jnp.where(q_position < chunk.lengths[:, None], q_position, -1)

    def head(state, q, k, v, position, q_position, length):
        tokens = Tokens(k.T, v, position, length, chunk.layer)
        window = window_of(q, q_position, k, position, scale=program.sizes.shape.scale)
        return program.policy.observe(state, window, tokens)

    of_heads = jax.vmap(head, in_axes=(0, 1, 0, 0, 0, None, None))
    of_rows = jax.vmap(of_heads, in_axes=(0, 1, 0, 0, 0, 0, 0))
    return of_rows(state, chunk.queries, k, v, position, q_position, chunk.lengths)


def observe_prompt(
    program: GroupProgram,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    layer: jax.Array,
) -> PolicyState:
    """The states [K, ...] after a prompt's last queries q [W, K, G, H], head by head.

    k [K, H, S], v [K, S, H]: of the whole prompt, of which `length` int32[] tokens count.
    """
    window = q.shape[0]
    position = prompt_positions(k.shape[2], length)
    q_position = length - window + jnp.arange(window, dtype=jnp.int32)
    empty = program.policy.init_state(k.shape[2])

    def head(of_head: tuple[jax.Array, jax.Array, jax.Array]) -> PolicyState:
        q, k, v = of_head
        tokens = Tokens(k.T, v, position, length, layer)
        seen = window_of(q, q_position, k, position, scale=program.sizes.shape.scale)
        return program.policy.observe(empty, seen, tokens)

    return lax.map(head, (q.swapaxes(0, 1), k, v))


def prompt_state(program: GroupProgram, prompt: Prompt) -> PolicyState:
    """What the policy remembers of each head at a prompt's end: leaves [K, ...]."""
    policy, (heads, _, tokens) = program.policy, prompt.k.shape
    if policy.prompt_window is None:
        return prompt.observed
    if policy.prompt_window == 0:
        return jax.tree.map(lambda leaf: leaf[0], empty_state(program, heads, tokens, 1))
    queries = prompt.queries[-policy.prompt_window :]
    return observe_prompt(program, queries, prompt.k, prompt.v, prompt.length, prompt.layer)


def observe_all(
    policy: Policy,
    state: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_position: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
) -> Any:
    """The states [K, ...] after every query of a prefill chunk, head by head, block by block.

    q [T, K, G, H] at int32[T], -1 for padding. k [K, H, S], v [K, S, H]: of the prompt up to and
    with this chunk.
    """
    block = largest_divisor(q.shape[0], _BLOCK)
    length = q_position.max() + 1
    position = prompt_positions(k.shape[2], length)
    q_position = q_position.reshape(-1, block)

    def head(of_head: tuple[Any, jax.Array, jax.Array, jax.Array]) -> Any:
        state, q, k, v = of_head
        tokens = Tokens(k.T, v, position, length, layer)

        def step(state: Any, piece: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            seen = window_of(*piece, k, position, scale=scale)
            return policy.observe(state, seen, tokens), None

        pieces = (q.reshape(-1, block, *q.shape[1:]), q_position)
        return lax.scan(step, state, pieces)[0]

    return lax.map(head, (state, q.swapaxes(0, 1), k, v))


def prompt_positions(tokens: int, length: jax.Array) -> jax.Array:
    """int32[T]: 0, 1, ... for the tokens of a prompt, -1 beyond it."""
    position = jnp.arange(tokens, dtype=jnp.int32)
    return jnp.where(position < length, position, -1)
