"""A plain NumPy model of the cache under FlexiCache, for test_cache_model.py.

The model keeps every request's keys and values densely, each request for itself, and follows the
written rules with loops and sets. Keys, values and queries are small whole numbers, so scores are
exact and the choice of pages is too.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from flexijax.models.config import AttentionShape
from flexijax.models.decoder import DecoderLike

LAYERS, KV_HEADS, GROUP, WIDTH, VOCAB = 2, 2, 2, 8, 13
# R is no multiple of the page, so that one page or two fill up between reranks.
PAGE, BUDGET, STEPS, PAGES, ROWS, BLOCKS = 4, 3, 6, 20, 2, 26
SHAPE = AttentionShape(LAYERS, KV_HEADS * GROUP, KV_HEADS, WIDTH, 0.05)
UNSTABLE = ((1,), ())


@dataclasses.dataclass(frozen=True)
class TableDecoder(DecoderLike):
    """Queries, keys and values are looked up by token and position; logits by what is attended.

    x: the token's number, and the sum of what the layers so far have attended.
    """

    def embed(self, params, tokens):
        attended = jnp.zeros((*tokens.shape, KV_HEADS * GROUP * WIDTH))
        return jnp.concatenate([tokens[..., None].astype(jnp.float32), attended], axis=-1)

    def layers(self, params):
        return [
            {name: (params[name][0][at], params[name][1][at]) for name in "qkv"}
            for at in range(LAYERS)
        ]

    def layer(self, weights, layer, x, positions, attention_fn, state, *, only=None):
        tokens = x[..., 0].astype(jnp.int32)
        q, k, v = (weights[name][0][tokens] + weights[name][1][positions] for name in "qkv")
        out, state = attention_fn(layer, q, k, v, state)
        x = x.at[..., 1:].add(out.reshape(*tokens.shape, -1))
        return x if only is None else x[:, only][:, None], state

    def norm(self, params, x):
        return x[..., 1:]

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
        self.interval = self.steps_until_rerank = interval
        self.reranks = self.choices = 0
        self.overlap = self.rco = 0.0


class Model:
    """One request. heads: its stable ones by (layer, head); adaptive: `Adaptive` or None."""

    def __init__(self, prompt, adaptive):
        self.tokens, self.adaptive = list(prompt), adaptive  # tokens held by the cache
        self.heads = {}
        self.began = len(prompt)  # tokens held when the chunk of steps began
        self.chunks = self.promoted = self.offloaded = 0
        pages = min(PAGES, BUDGET + ceil_pages(adaptive.longest if adaptive else STEPS))
        for layer in range(LAYERS):
            for head in set(range(KV_HEADS)) - set(UNSTABLE[layer]):
                best = self.best(layer, head)
                slots, _ = self._assigned(best, [-1] * pages)
                self.heads[layer, head] = Head(slots, best, adaptive.first if adaptive else STEPS)

    def dense(self, name, layer, head):
        return np.stack([at(name, layer, t, p)[head] for p, t in enumerate(self.tokens)])

    def best(self, layer, head, *, tail=None, room=BUDGET):
        """The best pages for the last token's queries, a set of `room`.

        The first page is always among them, and those from `tail` on, None for the newest.
        """
        length, count = len(self.tokens), ceil_pages(len(self.tokens))
        queries = at("q", layer, self.tokens[-1], length - 1)[head * GROUP : (head + 1) * GROUP]
        keys, scores = self.dense("k", layer, head), {}
        for page in range(count):
            part = keys[page * PAGE : (page + 1) * PAGE]
            low, high = part.min(0), part.max(0)
            scores[page] = max(np.maximum(q * low, q * high).sum() for q in queries)
        for page in (0, *range(count - 1 if tail is None else tail, count)):
            scores[page] = np.inf
        return set(sorted(scores, key=lambda page: (-scores[page], page))[:room])

    def read(self, layer, head):
        """The pages that a step attends."""
        if head in UNSTABLE[layer]:
            # Pages that filled up since the chunk began have no summary: attended, and those behind
            # the first of them beside the budget.
            newest = ceil_pages(len(self.tokens)) - 1
            tail = min(self.began // PAGE, newest)
            newer = min(newest - tail, ceil_pages(STEPS))
            return self.best(layer, head, tail=tail, room=BUDGET + newer)
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
        self.chunks += 1
        length = self.began = len(self.tokens)
        self.offloaded += len(self.heads) * (length // PAGE - (length - STEPS) // PAGE)
        for (layer, number), head in self.heads.items():
            head.steps_until_rerank -= STEPS
            if head.steps_until_rerank > 0:
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
                if self.adaptive and rco >= self.adaptive.lengthen_at:
                    head.interval = min(2 * head.interval, self.adaptive.longest)
                if self.adaptive and rco < self.adaptive.shorten_at:
                    head.interval = max(head.interval // 2, self.adaptive.shortest)
            head.choice, head.steps_until_rerank = best, head.interval

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
