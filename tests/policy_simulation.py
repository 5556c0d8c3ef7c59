"""What methods that drop tokens must keep, in float64 from their formulas, token by token.

A judge follows one KV head: `see` shows it each query with its logits over all that is held, in the
order of the text, and `ranks` says how it would rank what is held then, +inf to stay, -inf to go
even where there is room. `follow` holds a cache to that.
"""

import numpy as np

from flexijax.policies import kvcrush, lacache, treekv
from tests.policy_cases import SCALE


def follow(judges, texts, found, *, window):
    """Holds each head's kept positions, as `evicting_run.kept_by_heads` yields them, to a judge.

    window: queries of the prompt that are observed, None for all. Where ranks are equal or as good
    as that, any of the tokens may have stayed, and the judge goes on with what has.
    """
    held, before = [[] for _ in judges], 0
    for length, evicted, kept in found:
        for at, (judge, (q, k)) in enumerate(zip(judges, texts, strict=True)):
            first = max(length - window, 0) if before == 0 and window is not None else before
            mine = [*held[at], *range(before, length)]
            for query in range(first, length):
                seen = [token for token in mine if token <= query]
                logits = SCALE * q[:, query].astype(np.float64) @ k[seen].T.astype(np.float64)
                judge.see(query, seen, logits)
            check_kept(kept[at], judge.ranks(mine, length), judge.room)
            held[at] = kept[at]
            assert evicted[at] == length - len(kept[at])
        before = length


def check_kept(kept, ranks, room):
    """That the positions are the `room` of highest rank, of {position: rank}, ties aside."""
    may_stay = [rank for rank in ranks.values() if rank > -np.inf]
    assert len(set(kept)) == len(kept) == min(room, len(may_stay))
    assert set(kept) <= set(ranks)
    least = sorted(ranks.values())[-len(kept)]
    close = 1e-4 * max(abs(least), 1e-6) if np.isfinite(least) else 0.0
    assert {token for token, rank in ranks.items() if rank > least + close} <= set(kept)
    assert all(ranks[token] >= least - close for token in kept)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class A2SFJudge:
    def __init__(self, room, policy):
        self.room, self.policy, self.weight = room, policy, {}

    def see(self, query, held, logits):
        shares = softmax(logits).sum(0)
        for token, share in zip(held, shares, strict=True):
            self.weight[token] = self.policy.forgetting * self.weight.get(token, 0.0) + share

    def ranks(self, held, length):
        newest = length - self.policy.recent
        return {token: np.inf if token >= newest else self.weight[token] for token in held}


class MorphKVJudge:
    def __init__(self, room, policy):
        self.room, self.policy, self.seen = room, policy, []

    def see(self, query, held, logits):
        self.seen.append(dict(zip(held, logits.sum(0), strict=True)))

    def ranks(self, held, length):
        older = [token for token in held if token < length - self.policy.window]
        queries = self.seen[-self.policy.window :]
        weights = [softmax(np.array([of[token] for token in older])) for of in queries if older]
        fused = np.sum(weights, axis=0) if self.policy.fuse == "sum" else np.max(weights, axis=0)
        by_rank = dict(zip(older, np.atleast_1d(fused), strict=False))
        return {token: by_rank.get(token, np.inf) for token in held}


class LazyEvictionJudge:
    def __init__(self, room, policy):
        self.room, self.policy = room, policy
        self.active, self.longest = {}, {}

    def see(self, query, held, logits):
        for token, share in zip(held, softmax(logits).max(0), strict=True):
            last = self.active.setdefault(token, token)
            self.longest.setdefault(token, 0)
            if share >= self.policy.threshold:
                self.longest[token] = max(self.longest[token], query - last)
                self.active[token] = query

    def ranks(self, held, length):
        found = {}
        for token in held:
            idle, gap = length - 1 - self.active[token], self.longest[token]
            found[token] = -1 - idle
            if gap:
                found[token] = 2 / (1 + np.exp(1 + idle / gap)) + 2 / (1 + np.exp(gap - 1.0))
            if token >= length - self.policy.recent:
                found[token] = np.inf
        return found


class TreeKVJudge:
    def __init__(self, room, policy):
        self.room, self.policy, self.sums, self.counts, self.gone = room, policy, {}, {}, 0

    def see(self, query, held, logits):
        for token, share in zip(held, softmax(logits).sum(0), strict=True):
            self.sums[token] = self.sums.get(token, 0.0) + share
            self.counts[token] = self.counts.get(token, 0) + 1

    def ranks(self, held, length):
        newest = length - (self.room // 2 - self.policy.sinks)
        between = [token for token in held if self.policy.sinks <= token < newest]
        worth = [self.sums.get(token, 0.0) / self.counts.get(token, 1) for token in between]
        if not self.policy.attended:
            worth = [-token for token in between]
        going, width = max(len(held) - self.room, 0), self.room - self.room // 2
        stays = between
        if going:
            chosen = treekv.oracle(worth, width=width, first=self.gone, going=going)
            stays = [between[at] for at in chosen]
        self.gone += going
        return {token: float(token in stays) if token in between else np.inf for token in held}


class KVCrushJudge:
    def __init__(self, room, policy):
        self.room, self.policy, self.sums, self.counts = room, policy, {}, {}

    see = TreeKVJudge.see

    def ranks(self, held, length):
        page, newest = self.policy.page, length - int(self.policy.recent * self.room)
        weighed = [
            token
            for token in held
            if token >= self.policy.sinks and (token // page + 1) * page <= newest
        ]
        ranks = dict.fromkeys(held, np.inf)
        if not weighed:
            return ranks
        total = {token: self.sums.get(token, 0.0) for token in weighed}
        queries = {token: self.counts.get(token, 1) for token in weighed}
        heavy, stand = self.policy._pages(self.room)
        sizes = {"page": page, "heavy": heavy, "stand": stand}
        by_weight, stands = kvcrush.oracle(total, queries, **sizes)
        for token in weighed:
            place = by_weight.index(token // page)
            ranks[token] = (
                2.0 if place < heavy else 1.0 if token // page in stands else -1.0 - place
            )
        return ranks


class LaCacheJudge:
    def __init__(self, room, policy, layer=0):
        self.room, self.layer = room, layer
        first, rungs = policy._ladder(room)
        self.sizes = {"first": first, "margin": room - first - rungs, "rung": policy.rung}
        self.cursor, self.last = first, None

    def see(self, query, held, logits):
        pass

    def ranks(self, held, length):
        if self.last is None:
            left, self.cursor = self._thin(held)
        else:  # as the authors call it, after every token
            left = [token for token in held if token <= self.last]
            for token in held[len(left) :]:
                left, self.cursor = self._thin([*left, token])
        goes = -np.inf if self.last is None else 0.0
        self.last = length - 1
        assert len(left) <= self.room
        return {token: 1.0 if token in left else goes for token in held}

    def _thin(self, row):
        return lacache.oracle(row, self.cursor, layer=self.layer, room=self.room, **self.sizes)
