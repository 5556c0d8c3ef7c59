"""The cache against a plain NumPy model of it, under random admissions, finishes and reranks.

The model keeps every request's keys and values densely, each request for itself, and follows the
written rules with loops and sets; so it also says that no request disturbs another (law 6). Keys,
values and queries are small whole numbers, so scores are exact and the choice of pages is too.
"""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from flexijax.cache.cache import CacheLayout
from flexijax.engine.engine import CountedHead, Engine, Request
from flexijax.engine.prefill import Program
from flexijax.engine.sampling import Sampling
from flexijax.models.config import AttentionShape
from flexijax.models.language_model import LanguageModel
from flexijax.policies.base import Flexi
from flexijax.policies.intervals import Adaptive
from flexijax.policies.minmax import MinMax

LAYERS, KV_HEADS, GROUP, WIDTH, VOCAB = 2, 2, 2, 8, 13
# R is no multiple of the page, so that one page or two fill up between reranks.
PAGE, BUDGET, STEPS, PAGES, ROWS, BLOCKS = 4, 3, 6, 20, 2, 26
# None reranks all heads after every chunk; the thresholds are such that intervals change both ways.
PACES = {
    "fixed": None,
    "adaptive": Adaptive(
        shortest=STEPS, longest=4 * STEPS, first=2 * STEPS, lengthen_at=0.5, shorten_at=0.2
    ),
}
SHAPE = AttentionShape(LAYERS, KV_HEADS * GROUP, KV_HEADS, WIDTH, 0.05)
UNSTABLE = ((1,), ())


@dataclasses.dataclass(frozen=True)
class TableDecoder:
    """Queries, keys and values are looked up by token and position; logits by what is attended."""

    def hidden(self, params, tokens, positions, attend, state):
        x = 0.0
        for layer in range(LAYERS):
            q, k, v = (
                params[name][0][layer][tokens] + params[name][1][layer][positions] for name in "qkv"
            )
            out, state = attend(layer, q, k, v, state)
            x = x + out.reshape(*tokens.shape, -1)
        return x, state

    def logits(self, params, x):
        return x @ params["head"]


def tables():
    rng = np.random.default_rng(5)

    def pair(heads):
        return tuple(
            rng.integers(-3, 4, (LAYERS, count, heads, WIDTH)).astype(np.float32)
            for count in (VOCAB, PAGES * PAGE)
        )

    q, k, v = pair(KV_HEADS * GROUP), pair(KV_HEADS), pair(KV_HEADS)
    head = rng.normal(size=(KV_HEADS * GROUP * WIDTH, VOCAB)).astype(np.float32)
    return {"q": q, "k": k, "v": v, "head": head}


TABLES = tables()


def at(name, layer, token, position):
    """The query, key or value of one token: [heads, H]."""
    return TABLES[name][0][layer][token] + TABLES[name][1][layer][position]


def ceil_pages(length):
    return -(-length // PAGE)


class Head:
    """A stable head of one request: its slots, its last choice, and when it chooses next."""

    def __init__(self, slots, choice, interval):
        self.slots = slots  # the page in each slot or -1
        self.choice = choice  # a set of pages
        self.interval = self.wait = interval
        self.reranks = self.choices = 0
        self.overlap = self.rco = 0.0


class Model:
    """One request. heads: its stable ones by (layer, head); pace: an entry of `PACES`."""

    def __init__(self, prompt, pace):
        self.tokens, self.pace = list(prompt), pace  # tokens held by the cache
        self.heads = {}
        self.reranks = self.promoted = self.offloaded = 0
        pages = min(PAGES, BUDGET + ceil_pages(pace.longest if pace else STEPS))
        for layer in range(LAYERS):
            for head in set(range(KV_HEADS)) - set(UNSTABLE[layer]):
                best = self.best(layer, head)
                slots, _ = self._assigned(best, [-1] * pages)
                self.heads[layer, head] = Head(slots, best, pace.first if pace else STEPS)

    def dense(self, name, layer, head):
        return np.stack([at(name, layer, t, p)[head] for p, t in enumerate(self.tokens)])

    def best(self, layer, head):
        """The budget's best pages for the last token's queries: a set."""
        length, count = len(self.tokens), ceil_pages(len(self.tokens))
        queries = at("q", layer, self.tokens[-1], length - 1)[head * GROUP : (head + 1) * GROUP]
        keys, scores = self.dense("k", layer, head), {}
        for page in range(count):
            part = keys[page * PAGE : (page + 1) * PAGE]
            low, high = part.min(0), part.max(0)
            scores[page] = max(np.maximum(q * low, q * high).sum() for q in queries)
        scores[0] = scores[count - 1] = np.inf
        return set(sorted(scores, key=lambda page: (-scores[page], page))[:BUDGET])

    def read(self, layer, head):
        """The pages that a step attends."""
        if head in UNSTABLE[layer]:
            return self.best(layer, head)
        return {
            page
            for page in self.heads[layer, head].slots
            if 0 <= page < ceil_pages(len(self.tokens))
        }

    def logits(self, *, everything=False):
        """Of the token that follows, float64[V]; everything: dense, as while reading a prompt."""
        x, length = 0.0, len(self.tokens)
        for layer in range(LAYERS):
            outs = []
            for n in range(KV_HEADS * GROUP):
                head = n // GROUP
                pages = range(ceil_pages(length)) if everything else self.read(layer, head)
                seen = [t for t in range(length) if t // PAGE in pages]
                q = at("q", layer, self.tokens[-1], length - 1)[n].astype(np.float64)
                scores = self.dense("k", layer, head)[seen] @ q * SHAPE.scale
                weights = np.exp(scores - scores.max())
                outs.append(weights @ self.dense("v", layer, head)[seen] / weights.sum())
            x = x + np.concatenate(outs)
        return x @ TABLES["head"].astype(np.float64)

    def rerank(self):
        self.reranks += 1
        length = len(self.tokens)
        self.offloaded += len(self.heads) * (length // PAGE - (length - STEPS) // PAGE)
        for (layer, number), head in self.heads.items():
            head.wait -= STEPS
            if head.wait > 0:
                continue
            best, begun = self.best(layer, number), ceil_pages(length)
            head.slots, came = self._assigned(best, head.slots)
            self.promoted += came
            head.reranks += 1
            head.overlap += 1 - came / len(best)
            chance = len(best) / begun
            if chance < 1:
                rco = (len(best & head.choice) / len(best) - chance) / (1 - chance)
                head.rco += rco
                head.choices += 1
                if self.pace and rco >= self.pace.lengthen_at:
                    head.interval = min(2 * head.interval, self.pace.longest)
                if self.pace and rco < self.pace.shorten_at:
                    head.interval = max(head.interval // 2, self.pace.shortest)
            head.choice, head.wait = best, head.interval

    def _assigned(self, best, slots):
        """(slots afterwards, pages that came) of one head."""
        begun = ceil_pages(len(self.tokens))
        resident = {page for page in slots if 0 <= page < begun}
        after = [page if page in best else -1 for page in slots]
        coming = sorted(best - resident) + list(range(begun, PAGES))
        for slot, page in enumerate(after):
            if page < 0 and coming:
                after[slot] = coming.pop(0)
        return after, len(best - resident)


def assert_same(engine, running, model):
    """Laws 2 and 3 for one request: both tiers, summaries, slots and counters."""
    cache, row, layout = jax.device_get(engine.cache), running.row, engine.program.layout
    length, table = len(model.tokens), running.blocks
    assert cache.lengths[row] == length
    assert cache.block_table[row, : len(table)].tolist() == table
    for layer, (held, host) in enumerate(zip(cache.layers, cache.host, strict=True)):
        for i, head in enumerate(layout.slotted(layer)):
            k, v = model.dense("k", layer, head), model.dense("v", layer, head)
            slots = model.heads[layer, head].slots
            assert held.slot_page[row, i].tolist() == slots
            readable = set()
            for slot, page in enumerate(slots):
                if 0 <= page < ceil_pages(length):
                    part = slice(page * PAGE, min((page + 1) * PAGE, length))
                    count = part.stop - part.start
                    np.testing.assert_array_equal(held.slots_k[row, i, :, slot, :count].T, k[part])
                    np.testing.assert_array_equal(held.slots_v[row, i, slot, :count], v[part])
                    readable.add(page)
            for page in range(length // PAGE):
                part = slice(page * PAGE, (page + 1) * PAGE)
                np.testing.assert_array_equal(host.k[table[page], i], k[part])
                np.testing.assert_array_equal(host.v[table[page], i], v[part])
                bounds = [k[part].min(0), k[part].max(0)]
                np.testing.assert_array_equal(held.slotted_summaries[table[page], i], bounds)
                readable.add(page)
            assert readable == set(range(ceil_pages(length)))
        for i, head in enumerate(layout.paged[layer]):
            k, v = model.dense("k", layer, head), model.dense("v", layer, head)
            for page in range(ceil_pages(length)):
                part = slice(page * PAGE, min((page + 1) * PAGE, length))
                count = part.stop - part.start
                np.testing.assert_array_equal(held.pages_k[table[page], i, :count], k[part])
                np.testing.assert_array_equal(held.pages_v[table[page], i, :count], v[part])
                if count == PAGE:
                    bounds = [k[part].min(0), k[part].max(0)]
                    np.testing.assert_array_equal(held.paged_summaries[table[page], i], bounds)
    counted = engine.counted(running)
    assert counted[:3] == (model.reranks, model.promoted, model.offloaded)
    expected = [
        CountedHead(*key, of.reranks, of.overlap, of.rco, of.choices)
        for key, of in sorted(model.heads.items())
    ]
    np.testing.assert_allclose(counted.heads, expected, atol=1e-5)
    for layer, held in enumerate(cache.layers):
        if model.pace:
            mine = [model.heads[layer, head] for head in layout.slotted(layer)]
            assert held.pace.interval[row].tolist() == [head.interval for head in mine]
            assert held.pace.wait[row].tolist() == [head.wait for head in mine]


def assert_drawn(running, drawn, logits):
    """That token number `drawn` of the request is a most likely one, with its log-probability."""
    token, logprob = running.tokens[drawn], running.logprobs[drawn]
    assert logits[token] >= logits.max() - 1e-4
    expected = logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert logprob == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module", params=PACES)
def pace(request):
    return PACES[request.param]


@pytest.fixture(scope="module")
def make_engine(pace):
    score = MinMax("float32")
    tail = ceil_pages(pace.longest if pace else STEPS)
    policy = Flexi(score, UNSTABLE, BUDGET, tail, intervals=pace)
    layout = CacheLayout(
        shape=SHAPE,
        paged=UNSTABLE,
        rows=ROWS,
        blocks=BLOCKS,
        pages=PAGES,
        slots=policy.slots(PAGES),
        page_size=PAGE,
        offloads=True,
        dtype="float32",
        paced=pace is not None,
    )
    lm = LanguageModel(
        name="tables",
        decoder=TableDecoder(),
        params=jax.tree.map(jnp.asarray, TABLES),
        attention=SHAPE,
        vocab_size=VOCAB,
        max_context=PAGES * PAGE,
        dtype=jnp.dtype("float32"),
        tokenizer=None,
        fingerprint="tables",
    )
    program = Program(lm.decoder, layout, policy, STEPS, None, None)
    return lambda: Engine(lm, program, progress=None)


ADMIT = st.tuples(
    st.just("admit"),
    st.integers(1, 45),  # prompt tokens
    st.integers(1, 30),  # most new tokens
    st.booleans(),  # whether a token stops it
    st.integers(0, 9999),  # seed of the prompt
)
ACTIONS = st.lists(
    st.one_of(ADMIT, ADMIT, st.tuples(st.just("finish"), st.integers(0, 1))),
    min_size=2,
    max_size=5,
)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True, database=None)
@hypothesis.given(actions=ACTIONS, steps=st.integers(1, 3))
def test_cache_is_what_the_plain_model_says(make_engine, pace, actions, steps):
    """After every action `steps` chunks run, so requests come and go at all stages of others."""
    engine, models = make_engine(), {}

    def end(running):
        del models[running.request.index]
        engine.release(running)

    for index, (action, *values) in enumerate(actions):
        if action == "finish":
            for running in list(engine.running.values())[values[0] :][:1]:
                engine.stop(running)
                end(running)
        else:
            length, most, stops, seed = values
            request = Request(
                index=index,
                tokens=tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist()),
                max_new_tokens=most,
                sampling=Sampling(),
                seed=0,
                stop_ids=(3, 7) if stops else (),
            )
            if engine.can_admit(request):
                running = engine.admit(request, "")
                models[index] = Model(request.tokens, pace)
                assert_drawn(running, 0, models[index].logits(everything=True))
                if not running.active:
                    end(running)
        for chunk in range(steps + 1):
            for running in list(engine.running.values()):
                assert_same(engine, running, models[running.request.index])
            if chunk == steps or not engine.running:
                break
            before = {row: len(running.tokens) for row, running in engine.running.items()}
            for running in engine.step():
                model, first = models[running.request.index], before[running.row]
                assert len(running.tokens) - first == STEPS or not running.active
                for drawn in range(first, len(running.tokens)):
                    model.tokens.append(running.tokens[drawn - 1])
                    assert_drawn(running, drawn, model.logits())
                if running.active:
                    model.rerank()
                else:
                    end(running)
    assert all(running.active for running in engine.running.values())


def test_a_long_request_changes_its_intervals_both_ways(make_engine, pace):
    engine, seen, changes = make_engine(), set(), set()
    for seed in range(3):
        prompt = np.random.default_rng(seed).integers(0, VOCAB, 20).tolist()
        request = Request(
            index=0,
            tokens=tuple(prompt),
            max_new_tokens=PAGES * PAGE - 20,
            sampling=Sampling(),
            seed=0,
            stop_ids=(),
        )
        running = engine.admit(request, "")
        model = Model(prompt, pace)
        while running.active:
            before = {key: head.interval for key, head in model.heads.items()}
            first = len(running.tokens)
            engine.step()
            for drawn in range(first, len(running.tokens)):
                model.tokens.append(running.tokens[drawn - 1])
            if running.active:
                model.rerank()
                assert_same(engine, running, model)
            seen |= {head.interval for head in model.heads.values()}
            changes |= {head.interval > before[key] for key, head in model.heads.items()} - {False}
            changes |= {"shorter" for k, h in model.heads.items() if h.interval < before[k]}
        engine.release(running)
    if pace is None:
        assert seen == {STEPS} and not changes
    else:
        assert seen == {STEPS, 2 * STEPS, 4 * STEPS} and changes == {True, "shorter"}
