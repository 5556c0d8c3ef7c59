"""The oracles of decode attention, and of merging partial attention, in float64 NumPy.

They read nothing that the operation must not read, so arrays poisoned with NaN give finite results.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def attend(q: Array, k: Array, v: Array, *, scale: float) -> tuple[Array, Array]:
    """Softmax attention of one KV head: q [G, H], k and v [S, H] -> out [G, H], lse [G]."""
    if len(k) == 0:
        return np.zeros_like(q), np.full(len(q), -np.inf)
    logits = scale * q @ k.T
    peak = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    return weights @ v / total, (peak + np.log(total))[:, 0]


def paged_decode(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_ids: ArrayLike,
    token_counts: ArrayLike,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """Attention of q [B, K, G, H] over the first tokens of the listed pages.

    Args:
      q: [B, K, G, H]; k_pages, v_pages: [blocks, K, page, H].
      block_ids: int[B, K, n]; token_counts: int[B, K, n], 0 where a page is not read.
    Returns:
      out [B, K, G, H] and lse [B, K, G] in float64; 0 and -inf where nothing is read.
    """
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    ids, counts = np.asarray(block_ids), np.asarray(token_counts)
    batch, heads, group, width = q.shape
    out, lse = np.zeros(q.shape), np.zeros((batch, heads, group))
    for b in range(batch):
        for h in range(heads):
            read = [(i, c) for i, c in zip(ids[b, h], counts[b, h], strict=True) if i >= 0 and c]
            k = [k_pages[i, h, :c] for i, c in read] or [np.zeros((0, width))]
            v = [v_pages[i, h, :c] for i, c in read] or [np.zeros((0, width))]
            out[b, h], lse[b, h] = attend(
                q[b, h], np.concatenate(k), np.concatenate(v), scale=scale
            )
    return out, lse


def slot_decode(
    q: ArrayLike, k_slots: ArrayLike, v_slots: ArrayLike, token_counts: ArrayLike, *, scale: float
) -> tuple[Array, Array]:
    """As `paged_decode`, over a head's own slots.

    k_slots [B, K, H, S, page], v_slots [B, K, S, page, H], token_counts int[B, K, S].
    """
    q, k_slots, v_slots = (np.asarray(x, np.float64) for x in (q, k_slots, v_slots))
    counts = np.asarray(token_counts)
    batch, heads, slots, page, width = v_slots.shape
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for b in range(batch):
        for h in range(heads):
            valid = (np.arange(page) < counts[b, h][:, None]).reshape(slots * page)
            k = k_slots[b, h].reshape(width, slots * page).T[valid]
            v = v_slots[b, h].reshape(slots * page, width)[valid]
            out[b, h], lse[b, h] = attend(q[b, h], k, v, scale=scale)
    return out, lse


def merge(outs: ArrayLike, lses: ArrayLike) -> tuple[Array, Array]:
    """Attention over the union of disjoint sets of tokens, from the attention over each.

    outs [parts, ..., H], lses [parts, ...] -> out [..., H], lse [...]:
    lse = log sum exp lse_i, out = sum_i exp(lse_i - lse) out_i.
    """
    outs, lses = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    peak = lses.max(axis=0)
    safe = np.where(np.isneginf(peak), 0.0, peak)
    weights = np.exp(lses - safe)
    total = weights.sum(axis=0)
    shares = weights / np.where(total == 0, 1.0, total)
    out = np.where(shares[..., None] == 0, 0.0, shares[..., None] * outs).sum(axis=0)
    with np.errstate(divide="ignore"):
        return out, safe + np.log(total)
