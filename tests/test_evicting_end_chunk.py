"""Evicting under random ranks: the highest ranked stay, and all that is theirs stays with them."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from flexijax.cache import evicting
from flexijax.cache.arrays import Chunk
from flexijax.cache.evicting import EvictingGroup, EvictionStats
from flexijax.cache.layout import CacheSizes, GroupProgram
from flexijax.models.config import AttentionShape
from flexijax.policies.base import HeadGroup, Policy, PolicyState, Tier

PAGE = 4
BATCH, HEADS, ROOM, ENDS = 2, 3, 10, 7


@dataclasses.dataclass(frozen=True)
class Stored(Policy):
    """Ranks by a number that a token's first element of v says once, when the token comes."""

    @property
    def observes_decode(self):
        return True

    def groups(self, layer, run):
        return (HeadGroup(run.all_heads, (Tier(ROOM),), unit="token"),)

    def init_state(self, tokens):
        return PolicyState(
            tokens={"rank": jnp.full(tokens, jnp.nan), "pair": jnp.full((tokens, 2), -1)},
            head=jnp.int32(0),
        )

    def observe(self, state, window, tokens):
        fresh = jnp.isnan(state.tokens["rank"])
        pair = jnp.stack([tokens.position, -tokens.position], axis=-1)
        return PolicyState(
            tokens={
                "rank": jnp.where(fresh, tokens.v[:, 0], state.tokens["rank"]),
                "pair": jnp.where(fresh[:, None], pair, state.tokens["pair"]),
            },
            head=state.head + 1,
        )

    def rank_tokens(self, group, state, tokens):
        return state.tokens["rank"]


SIZES = CacheSizes(
    shape=AttentionShape(1, HEADS, HEADS, 2, 1.0),
    batch=BATCH,
    blocks=BATCH * 8,
    pages=8,
    page_size=PAGE,
    dtype="float32",
    chunk_steps=ENDS,
)
STORED = GroupProgram(SIZES, HeadGroup((), (Tier(ROOM),), unit="token"), Stored(), None, None)
PLACES = STORED.slots * PAGE
end_chunk = jax.jit(evicting.end_chunk, static_argnums=0)


def rank_of(row, head, position, seed):
    """A random number of each token, different from all others of its head."""
    return np.random.default_rng((seed, row, head)).permutation(200)[position].astype(np.float32)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    held=st.lists(st.integers(0, ROOM), min_size=BATCH, max_size=BATCH),
    came=st.lists(st.integers(1, ENDS), min_size=BATCH, max_size=BATCH),
    seed=st.integers(0, 9999),
)
def test_the_highest_ranked_stay_with_all_that_is_theirs(held, came, seed):
    """Tokens held before in any order, then those that came; free places hold anything."""
    rng, filled = np.random.default_rng(seed), np.array(held) + came
    position = np.full((BATCH, HEADS, PLACES), 77, np.int32)
    k, v = (np.full((BATCH, HEADS, PLACES, 2), np.nan, np.float32) for _ in "kv")
    rank = rng.normal(size=(BATCH, HEADS, PLACES)).astype(np.float32)
    pair = rng.integers(0, 99, (BATCH, HEADS, PLACES, 2)).astype(np.int32)
    for row, head in np.ndindex(BATCH, HEADS):
        old, all_ = held[row], filled[row]
        # Of the 20 tokens before, some are held, and have been seen.
        where = np.append(rng.permutation(20)[:old], 20 + np.arange(came[row]))
        position[row, head, :all_] = where
        ranks = rank_of(row, head, where, seed)
        k[row, head, :all_] = where[:, None] + [0.25, 0.5]
        v[row, head, :all_] = np.stack([ranks, where], axis=-1)
        rank[row, head, :old] = ranks[:old]
        pair[row, head, :old] = np.stack([where, -where], axis=-1)[:old]
    pages = (BATCH, HEADS, STORED.slots, PAGE, 2)
    group = EvictingGroup(
        k=jnp.asarray(k.reshape(pages).transpose(0, 1, 4, 2, 3)),
        v=jnp.asarray(v.reshape(pages)),
        position=jnp.asarray(position),
        count=jnp.broadcast_to(jnp.asarray(filled, jnp.int32)[:, None], (BATCH, HEADS)),
        state=PolicyState(
            {"rank": jnp.asarray(rank), "pair": jnp.asarray(pair)},
            jnp.zeros((BATCH, HEADS), jnp.int32),
        ),
    )
    chunk = Chunk(
        block_table=jnp.zeros((BATCH, 8), jnp.int32),
        before=jnp.full(BATCH, 20, jnp.int32),
        held=jnp.asarray(20 + np.array(came), jnp.int32),
        lengths=jnp.asarray(20 + np.array(came), jnp.int32),
        active=jnp.ones(BATCH, bool),
        summarized=jnp.zeros(BATCH, jnp.int32),
        filled_page=jnp.full((BATCH, 1), -1, jnp.int32),
        filled_block=jnp.full((BATCH, 1), -1, jnp.int32),
        layer=jnp.int32(0),
        queries=jnp.ones((ENDS, BATCH, HEADS, 1, 2)),
    )
    stats = EvictionStats(jnp.full((BATCH, HEADS), 3, jnp.int32))
    after, _, evicted = jax.device_get(end_chunk(STORED, group, None, stats, chunk))
    for row, head in np.ndindex(BATCH, HEADS):
        where = position[row, head, : filled[row]]
        ranks = rank_of(row, head, where, seed)
        expected = where[np.argsort(-ranks)][:ROOM]
        count = after.count[row, head]
        kept = after.position[row, head, :count]
        assert sorted(kept) == sorted(expected)
        assert evicted.evicted[row, head] == 3 + filled[row] - count
        # Every leaf of a token is where its position is.
        ranks = rank_of(row, head, kept, seed)
        keys = after.k[row, head].reshape(2, -1)[:, :count].T
        values = after.v[row, head].reshape(-1, 2)[:count]
        np.testing.assert_array_equal(keys, kept[:, None] + [0.25, 0.5])
        np.testing.assert_array_equal(values, np.stack([ranks, kept], axis=-1))
        np.testing.assert_array_equal(after.state.tokens["rank"][row, head, :count], ranks)
        pairs = np.stack([kept, -kept], axis=-1)
        np.testing.assert_array_equal(after.state.tokens["pair"][row, head, :count], pairs)
        assert after.state.head[row, head] == 1
        # Whoever keeps a place below the new count is not moved.
        stays = np.isin(where[:count], expected)
        np.testing.assert_array_equal(kept[stays], where[:count][stays])
