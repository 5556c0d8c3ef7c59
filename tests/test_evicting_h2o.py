"""The evicting groups of the cache keep what H2O's simulation in float64 keeps, chunk by chunk."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.cache import evicting
from flexijax.cache.arrays import Chunk, Prompt, Step
from flexijax.cache.layout import CacheSizes, GroupProgram
from flexijax.cache.observe import window_of
from flexijax.models.config import AttentionShape
from flexijax.policies.base import Policy, Tokens
from flexijax.policies.h2o import H2O
from tests.h2o_simulation import simulate_h2o
from tests.policy_cases import HEAD_DIM, SCALE, random_text
from tests.policy_cases import evicting as evicting_group

HEADS, GROUP, PROMPT, STEPS, ROOM = 2, 3, 30, 24, 12


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_h2o_in_the_cache_keeps_what_the_simulation_keeps(chunk):
    shape = AttentionShape(1, HEADS * GROUP, HEADS, HEAD_DIM, SCALE)
    sizes = CacheSizes(shape, 1, 16, 16, 4, "float32", chunk)
    program = GroupProgram(sizes, evicting_group(ROOM), H2O(), None, None)
    texts = [random_text(seed, query_heads=GROUP, length=PROMPT + STEPS) for seed in range(HEADS)]
    q, k = (jnp.stack(side) for side in zip(*texts, strict=True))  # [K, G, T, H], [K, T, H]
    expected = [
        simulate_h2o(
            *text, scale=SCALE, room=ROOM, recent=0.5, prompt=PROMPT, steps=STEPS, chunk=chunk
        )
        for text in texts
    ]

    def scalar(value):
        return jnp.asarray(value, jnp.int32)

    def observed(q, k):
        position = jnp.arange(PROMPT, dtype=jnp.int32)
        tokens = Tokens(k, k, position, scalar(PROMPT), scalar(0))
        window = window_of(q.swapaxes(0, 1), position, k.T, position, scale=SCALE)
        return H2O().observe(H2O().init_state(PROMPT), window, tokens)

    table, active = jnp.zeros((1, 16), jnp.int32), jnp.ones(1, bool)
    prompt_k = k[:, :PROMPT]
    prompt = Prompt(
        k=prompt_k.swapaxes(1, 2),
        v=prompt_k,
        queries=q[:, :, PROMPT - 1 : PROMPT].transpose(2, 0, 1, 3),
        observed=jax.vmap(observed)(q[:, :, :PROMPT], prompt_k),
        row=scalar(0),
        blocks=table[0],
        length=scalar(PROMPT),
        start=scalar(0),
        layer=scalar(0),
    )
    group, stats = evicting.empty(program, HEADS)
    group, _, stats = jax.jit(evicting.commit, static_argnums=0)(
        program, group, None, stats, prompt
    )

    @functools.partial(jax.jit, static_argnums=0)
    def add(program, group, q, now, step):
        store = evicting.store(program, group, tuple(range(HEADS)), q, step)
        return evicting.after_step(group, store.append(now, now), step)

    end_chunk = jax.jit(evicting.end_chunk, static_argnums=0)

    def kept(head):
        return sorted(np.asarray(group.position)[0, head, : int(group.count[0, head])].tolist())

    for head in range(HEADS):
        assert kept(head) == expected[head][0].tolist()
    for at, start in enumerate(range(PROMPT, PROMPT + STEPS, chunk), start=1):
        for step in range(start, start + chunk):
            place = Step(table, jnp.full(1, step, jnp.int32), jnp.zeros(1, jnp.int32))
            now = k[None, :, step]
            group = add(program, group, q[None, :, :, step], now, place)
        ended = Chunk(
            block_table=table,
            before=jnp.full(1, start, jnp.int32),
            held=jnp.full(1, start + chunk, jnp.int32),
            lengths=jnp.full(1, start + chunk, jnp.int32),
            active=active,
            summarized=jnp.zeros(1, jnp.int32),
            filled_page=jnp.full((1, 1), -1, jnp.int32),
            filled_block=jnp.full((1, 1), -1, jnp.int32),
            layer=scalar(0),
            queries=q[:, :, start : start + chunk].transpose(2, 0, 1, 3)[:, None],
        )
        group, _, stats = end_chunk(program, group, None, stats, ended)
        for head in range(HEADS):
            assert kept(head) == expected[head][at].tolist()
    assert (np.asarray(stats.evicted) == PROMPT + STEPS - ROOM).all()


@dataclasses.dataclass(frozen=True)
class AllAlike(Policy):
    """Every token is to stay."""

    def groups(self, layer, run):
        """Not asked."""
        return ()

    def rank_tokens(self, group, state, tokens):
        """+inf, of places without a token too."""
        return jnp.full(tokens.position.shape, jnp.inf)


def test_where_all_tokens_are_to_stay_some_that_are_there_go():
    shape = AttentionShape(1, HEADS * GROUP, HEADS, HEAD_DIM, SCALE)
    sizes = CacheSizes(shape, 1, 16, 16, 4, "float32", 8)
    program = GroupProgram(sizes, evicting_group(ROOM), AllAlike(), None, None)
    group, stats = evicting.empty(program, HEADS)
    places, count = group.position.shape[2], ROOM + 5
    group = dataclasses.replace(
        group,
        position=jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32), group.position.shape),
        count=jnp.full((1, HEADS), count, jnp.int32),
    )
    one = jnp.ones(1, jnp.int32)
    queries = jnp.zeros((1, 1, HEADS, GROUP, HEAD_DIM))
    ended = Chunk(
        block_table=one[:, None],
        before=ROOM * one,
        held=count * one,
        lengths=count * one,
        active=one > 0,
        summarized=0 * one,
        filled_page=-one[:, None],
        filled_block=-one[:, None],
        layer=one[0],
        queries=queries,
    )
    group, _, stats = evicting.end_chunk(program, group, None, stats, ended)
    assert group.count.tolist() == [[ROOM] * HEADS]
    assert stats.evicted.tolist() == [[5] * HEADS]
    for head in range(HEADS):
        kept = np.asarray(group.position)[0, head, :ROOM].tolist()
        assert len(set(kept)) == ROOM and max(kept) < count
