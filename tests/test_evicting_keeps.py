"""What evicting heads keep, against float64 simulations of each policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.cache.cache import all_rows
from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.engine.program import Runner
from flexijax.models.language_model import LanguageModel
from flexijax.policies import h2o, snapkv, streaming_llm
from tests.cache_model import GROUP, KV_HEADS, LAYERS, SHAPE, VOCAB, WIDTH, TableDecoder

pytestmark = pytest.mark.usefixtures("short_chunks")

PAGE, BUDGET, STEPS, NEW = 4, 24, 6, 48
SINKS, WINDOW, KERNEL = 2, 5, 3
POLICIES = {
    "streaming_llm": streaming_llm.StreamingLLM(sinks=SINKS),
    "snapkv": snapkv.SnapKV(window=WINDOW, kernel=KERNEL),
    "h2o": h2o.H2O(recent=0.25),
}


def tables(room=128):
    """As those of cache_model.py, of real numbers, so that no two tokens are ranked alike."""
    rng = np.random.default_rng(5)

    def pair(heads):
        return tuple(
            rng.normal(size=(LAYERS, count, heads, WIDTH)).astype(np.float32)
            for count in (VOCAB, room)
        )

    q, k, v = pair(KV_HEADS * GROUP), pair(KV_HEADS), pair(KV_HEADS)
    head = rng.normal(size=(KV_HEADS * GROUP * WIDTH, VOCAB)).astype(np.float32)
    return {"q": tuple(3 * part for part in q), "k": k, "v": v, "head": head}


TABLES = tables()


def dense(name, layer, text):
    """Queries [T, N, H], keys or values [T, K, H] of a text: they depend on nothing attended."""
    return TABLES[name][0][layer][text] + TABLES[name][1][layer][: len(text)]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(
        name="tables",
        decoder=TableDecoder(),
        params=jax.tree.map(jnp.asarray, TABLES),
        attention=dataclasses.replace(SHAPE, scale=WIDTH**-0.5),
        vocab_size=VOCAB,
        max_context=128,
        dtype=jnp.dtype("float32"),
        tokenizer=None,
        fingerprint="tables",
    )


class Simulation:
    """One KV head, float64. kept: positions; rank: of each kept one at the last decision."""

    def __init__(self, name, layer, head, prompt, scale):
        self.name, self.layer, self.head, self.scale = name, layer, head, scale
        self.kept = set(range(len(prompt)))
        self.weight = {}  # of H2O, by position
        q, k = self._of(prompt)
        if name == "h2o":
            self.weight = dict(enumerate(h2o.oracle(q, k, scale=scale)))
        if name == "snapkv":
            rank = snapkv.oracle(q, k, scale=scale, window=WINDOW, kernel=KERNEL)
            self.rank = dict(enumerate(rank))
        else:
            self._rank(len(prompt))

    def _of(self, text):
        q = dense("q", self.layer, text)[:, self.head * GROUP : (self.head + 1) * GROUP]
        return q.swapaxes(0, 1), dense("k", self.layer, text)[:, self.head]

    def _rank(self, length):
        if self.name == "streaming_llm":
            stays = streaming_llm.oracle(length, sinks=SINKS, room=BUDGET)
            self.rank = {token: stays[token] for token in self.kept}
        elif self.name == "h2o":
            newest = length - int(0.25 * BUDGET)
            self.rank = {t: np.inf if t >= newest else self.weight[t] for t in self.kept}

    def chunk(self, text):
        """After STEPS more tokens: what was held was attended, and is ranked anew."""
        before = len(text) - STEPS
        q, k = (array.astype(np.float64) for array in self._of(text))
        for position in range(before, len(text)):
            self.kept.add(position)
            held = sorted(self.kept)
            logits = self.scale * q[:, position] @ k[held].T
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights = (weights / weights.sum(-1, keepdims=True)).sum(0)
            for token, weight in zip(held, weights, strict=True):
                self.weight[token] = self.weight.get(token, 0.0) + weight
        self._rank(len(text))

    def check(self, kept, room):
        """That the positions are the `room` of highest rank, ties aside, and goes on from them."""
        assert len(set(kept)) == len(kept) == min(room, len(self.kept))
        if len(kept) < len(self.kept):
            least = sorted(self.rank.values())[-room]
            close = 1e-4 * max(abs(least), 1e-6) if np.isfinite(least) else 0.0
            assert {t for t, rank in self.rank.items() if rank > least + close} <= set(kept)
            assert all(self.rank[token] >= least - close for token in kept)
        assert set(kept) <= self.kept
        self.kept = set(kept)


def watched(continuation, counts):
    """The continuation, which notes the greatest count of a head before anything is evicted."""

    class Watched(Runner):
        def run(self, stage, function, static, args, donate=()):
            if function.__name__ == "end_chunk_layer":
                counts.append(int(args[0].groups[0].count.max()))
            return super().run(stage, function, static, args, donate)

    continuation._runner = Watched(None)
    return continuation


@pytest.mark.parametrize("length", [61, 17])
@pytest.mark.parametrize("name", POLICIES)
def test_kept_tokens_are_those_of_the_simulation(name, length, lm):
    """After a prompt of more than the budget, or less, and after every chunk."""
    config = CacheConfig(
        policy=POLICIES[name], page_size=PAGE, budget_tokens=BUDGET, rerank_interval=STEPS
    )
    program = make_program(lm, config, max_tokens=length + NEW, max_new_tokens=NEW)
    text = np.random.default_rng(length).integers(0, VOCAB, length + NEW).tolist()
    counts: list[int] = []
    made = read(lm, [program], text[:length])
    fed = watched(Continuation(lm, program, made), counts)
    room = BUDGET
    heads = {
        (layer, head): Simulation(name, layer, head, text[:length], lm.attention.scale)
        for layer in range(LAYERS)
        for head in range(KV_HEADS)
    }
    for now in range(length, len(text) + 1, STEPS):
        if now > length:
            fed.feed(text[now - STEPS : now])
            for head in heads.values():
                head.chunk(text[:now])
            if name == "snapkv":  # all that is generated stays
                room = BUDGET + NEW
        cache = jax.device_get(all_rows(fed.cache))
        for (layer, head), simulation in heads.items():
            group, stats = cache.layers[layer].groups[0], cache.layers[layer].stats[0]
            count = int(group.count[0, head])
            kept = group.position[0, head, :count]
            simulation.check(kept.tolist(), room)
            keys = group.k[0, head].reshape(WIDTH, -1)[:, :count].T
            values = group.v[0, head].reshape(-1, WIDTH)[:count]
            np.testing.assert_array_equal(keys, dense("k", layer, text[:now])[kept, head])
            np.testing.assert_array_equal(values, dense("v", layer, text[:now])[kept, head])
            assert count <= room and count + stats.evicted[0, head] == now
        assert fed.stats.evicted_tokens == sum(now - len(s.kept) for s in heads.values())
    assert len(counts) == LAYERS * (NEW // STEPS)
    assert max(counts) <= room + STEPS
    if name == "streaming_llm":
        recent = set(range(len(text) - BUDGET + SINKS, len(text)))
        assert all(of.kept == recent | set(range(SINKS)) for of in heads.values())
    else:
        assert len({frozenset(of.kept) for of in heads.values()}) == len(heads) or length < BUDGET
