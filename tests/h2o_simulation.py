"""H2O while decoding, in float64 NumPy from the formula: what a cache that evicts must keep."""

import numpy as np


def simulate_h2o(q, k, *, scale, room, recent, prompt, steps, chunk):
    """The kept positions, ascending, after the prompt and then after each chunk of steps.

    q: float[G, T, H], k: float[T, H] of one KV head, T = prompt + steps. room: tokens that stay;
    recent: the share of it for the newest ones. chunk: steps between two evictions; the last may be
    shorter. During a chunk every token that has come is attended. Returns a list of int64 arrays,
    1 + ceil(steps / chunk) of them.
    """
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    assert q.shape[1] == k.shape[0] == prompt + steps
    weight = np.zeros(prompt + steps)
    kept, found = np.arange(0), []
    starts = [0, *range(prompt, prompt + steps, chunk)]
    for start, stop in zip(starts, [*starts[1:], prompt + steps], strict=True):
        new = np.arange(start, stop)
        kept = np.concatenate([kept, new])
        weight[kept] += _gathered(q[:, new], k[kept], kept <= new[:, None], scale)
        kept = _evicted(kept, weight, room=room, newest=stop - int(recent * room))
        found.append(kept)
    return found


def _gathered(q, k, sees, scale):
    """The attention that each of T tokens gets from q [G, W, H]; sees: bool[W, T]."""
    logits = np.where(sees, scale * np.einsum("gwh,th->gwt", q, k), -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=(0, 1))


def _evicted(kept, weight, *, room, newest):
    """Those from position `newest` on and the heaviest others, `room` of them at most."""
    if len(kept) <= room:
        return kept
    recent, others = kept[kept >= newest], kept[kept < newest]
    heaviest_last = others[np.argsort(weight[others])]
    return np.sort(np.concatenate([recent, heaviest_last[len(kept) - room :]]))
