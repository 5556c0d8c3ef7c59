"""One row of evicting heads, taken through a prompt and chunks of steps by hand, no model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache import evicting
from flexijax.cache.arrays import Chunk, Prompt, Step, empty_state
from flexijax.cache.layout import CacheSizes, GroupProgram
from flexijax.cache.observe import observe_all
from flexijax.models.config import AttentionShape
from flexijax.policies.streaming_llm import StreamingLLM
from tests.policy_cases import HEAD_DIM, SCALE
from tests.policy_cases import evicting as evicting_group

PAGE, PAGES, PADDED = 4, 64, 64


@functools.partial(jax.jit, static_argnums=0)
def append(program, group, q, k, step):
    """The group with a token more; it depends on nothing that the policy says."""
    store = evicting.store(program, group, tuple(range(k.shape[1])), q, step)
    return evicting.after_step(group, store.append(k, k), step)


commit = jax.jit(evicting.commit, static_argnums=0)
end_chunk = jax.jit(evicting.end_chunk, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def observed(program, q, q_position, k, layer):
    """The state of each head after all queries q [T, K, G, H] of a prompt k [K, T, H]."""
    state = empty_state(program, len(k), k.shape[1], 1)
    state = jax.tree.map(lambda leaf: leaf[0], state)
    args = (state, q, k.swapaxes(1, 2), k, q_position, layer)
    return observe_all(program.policy, *args, scale=SCALE)


def kept_by_heads(policy, texts, *, room, prompt, steps, chunk, layer=0):
    """Yields (length, evicted tokens, kept positions of each head): after the prompt, each chunk.

    texts: of each head q float[G, T, H] and k float[T, H], T = prompt + steps. Behind the prompt
    stands padding of NaN up to PADDED tokens, and NaN is what the buffer holds at first.
    """
    q, k = (jnp.stack(side) for side in zip(*texts, strict=True))  # [K, G, T, H], [K, T, H]
    heads, group_size = q.shape[:2]
    shape = AttentionShape(1, heads * group_size, heads, HEAD_DIM, SCALE)
    sizes = CacheSizes(shape, 1, PAGES, PAGES, PAGE, "float32", chunk)
    program = GroupProgram(sizes, evicting_group(room), policy, None, None)
    stepping = GroupProgram(sizes, evicting_group(room), StreamingLLM(), None, None)
    table, one = jnp.zeros((1, PAGES), jnp.int32), jnp.ones(1, jnp.int32)
    layer = jnp.int32(layer)

    padded = jnp.full((heads, PADDED, HEAD_DIM), jnp.nan).at[:, :prompt].set(k[:, :prompt])
    # A window of more than the prompt has queries of no token before it.
    window = policy.prompt_window or 1
    queries = jnp.pad(q, ((0, 0), (0, 0), (window, 0), (0, 0)))[:, :, prompt : prompt + window]
    state = ()
    if policy.prompt_window is None:
        place = jnp.arange(PADDED, dtype=jnp.int32)
        every = jnp.pad(q, ((0, 0), (0, 0), (0, PADDED), (0, 0)))[:, :, :PADDED]
        every, position = every.transpose(2, 0, 1, 3), jnp.where(place < prompt, place, -1)
        state = observed(program, every, position, padded, layer)
    group, stats = evicting.empty(program, heads)
    spoilt = {name: jnp.full_like(getattr(group, name), jnp.nan) for name in "kv"}
    group = dataclasses.replace(group, **spoilt)
    made = Prompt(
        k=padded.swapaxes(1, 2),
        v=padded,
        queries=queries.transpose(2, 0, 1, 3),
        observed=state,
        row=jnp.int32(0),
        blocks=table[0],
        length=jnp.int32(prompt),
        start=jnp.int32(0),
        layer=layer,
    )
    group, _, stats = commit(program, group, None, stats, made)
    yield prompt, *_found(group, stats)
    for start in range(prompt, prompt + steps, chunk):
        for step in range(start, start + chunk):
            place = Step(table, step * one, 0 * one)
            group = append(stepping, group, q[None, :, :, step], k[None, :, step], place)
        ended = Chunk(
            block_table=table,
            before=start * one,
            held=(start + chunk) * one,
            lengths=(start + chunk) * one,
            active=one > 0,
            summarized=0 * one,
            filled_page=-one[:, None],
            filled_block=-one[:, None],
            layer=layer,
            queries=q[:, :, start : start + chunk].transpose(2, 0, 1, 3)[:, None],
        )
        group, _, stats = end_chunk(program, group, None, stats, ended)
        yield start + chunk, *_found(group, stats)


def _found(group, stats):
    counts, position = np.asarray(group.count)[0], np.asarray(group.position)[0]
    kept = [sorted(row[:count].tolist()) for row, count in zip(position, counts, strict=True)]
    return np.asarray(stats.evicted)[0].tolist(), kept
