"""The oracles: every operation written from its formula in float64 NumPy, one request at a time.

Slow and obvious on purpose. They read nothing that the operation must not read, so that arrays
poisoned with NaN give finite results.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _float64(x: ArrayLike) -> Array:
    return np.asarray(x).astype(np.float64)


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
    q, k_pages, v_pages = _float64(q), _float64(k_pages), _float64(v_pages)
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
    q, k_slots, v_slots = _float64(q), _float64(k_slots), _float64(v_slots)
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
    outs, lses = _float64(outs), _float64(lses)
    peak = lses.max(axis=0)
    safe = np.where(np.isneginf(peak), 0.0, peak)
    weights = np.exp(lses - safe)
    total = weights.sum(axis=0)
    shares = weights / np.where(total == 0, 1.0, total)
    out = np.where(shares[..., None] == 0, 0.0, shares[..., None] * outs).sum(axis=0)
    with np.errstate(divide="ignore"):
        return out, safe + np.log(total)


def page_scores(
    q: ArrayLike,
    summaries: ArrayLike,
    block_table: ArrayLike,
    lengths: ArrayLike,
    *,
    page_size: int,
) -> Array:
    """Upper bound of q.k over each page: max over G of sum over H of max(q*max, q*min).

    Args:
      q: [B, K, G, H]; summaries: [blocks, K, 2, H] with the minimum first, then the maximum.
      block_table: int[B, P]; lengths: int[B], tokens of each request.
    Returns:
      float64[B, K, P], -inf at and beyond page ceil(length / page_size).
    """
    q, summaries = _float64(q), _float64(summaries)
    table, lengths = np.asarray(block_table), np.asarray(lengths)
    scores = np.full((q.shape[0], q.shape[1], table.shape[1]), -np.inf)
    for b in range(q.shape[0]):
        for p in range(min(-(-int(lengths[b]) // page_size), table.shape[1])):
            low, high = summaries[table[b, p], :, 0], summaries[table[b, p], :, 1]  # [K, H]
            bound = np.maximum(q[b] * high[:, None], q[b] * low[:, None]).sum(axis=-1)  # [K, G]
            scores[b, :, p] = bound.max(axis=-1)
    return scores


def hadamard(width: int) -> Array:
    """Sylvester's matrix, made orthogonal: row i, column j is (-1)**(number of bits of i & j).

    Repeated on the diagonal, each as wide as the greatest power of two that divides `width`.
    """
    block = width & -width
    one = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
    return np.kron(np.eye(width // block), np.array(one)) / np.sqrt(block)


def sketch_code(keys: ArrayLike, *, spacing: float) -> tuple[Array, Array]:
    """Mean of the turned keys [S, H] and step = spacing * deviation, each [H]."""
    turned = _float64(keys) @ hadamard(np.shape(keys)[-1])
    return turned.mean(axis=0), spacing * turned.std(axis=0)


def sketch_levels(keys: ArrayLike, mean: ArrayLike, step: ArrayLike, *, bits: int) -> Array:
    """Which of 2**bits levels about the mean is nearest to each turned key: [S, H], 0 is lowest."""
    turned = _float64(keys) @ hadamard(np.shape(keys)[-1])
    lowest = _float64(mean) - (2**bits - 1) / 2 * _float64(step)
    return np.clip(np.round((turned - lowest) / _float64(step)), 0, 2**bits - 1)


def sketch_unpack(codes: ArrayLike, width: int) -> Array:
    """uint32[..., bits, W, page] -> levels [..., page, width]; channel 32 * w + i is bit i."""
    codes = np.asarray(codes)
    levels = np.zeros((*codes.shape[:-3], codes.shape[-1], width))
    for channel in range(width):
        word, place = divmod(channel, 32)
        for bit in range(codes.shape[-3]):
            levels[..., channel] += 2**bit * (codes[..., bit, word, :] >> np.uint32(place) & 1)
    return levels


def sketch_scores(
    weights: ArrayLike,
    offset: ArrayLike,
    unit: ArrayLike,
    codes: ArrayLike,
    block_table: ArrayLike,
    lengths: ArrayLike,
    *,
    page_size: int,
) -> Array:
    """Log of the sum over a page's tokens of exp(offset + unit * sum over H of weight * level).

    weights [B, K, G, H]; offset, unit [B, K, G]; codes uint32[blocks, K, bits, W, page];
    block_table int[B, P]; lengths int[B] -> float64[B, K, G, P], -inf where a page is not full.
    """
    weights, offset, unit = _float64(weights), _float64(offset), _float64(unit)
    codes, table, lengths = np.asarray(codes), np.asarray(block_table), np.asarray(lengths)
    scores = np.full((*offset.shape, table.shape[1]), -np.inf)
    for b in range(len(lengths)):
        for p in range(int(lengths[b]) // page_size):
            levels = sketch_unpack(codes[table[b, p]], weights.shape[-1])  # [K, page, H]
            products = np.einsum("KGH,KSH->KGS", weights[b], levels)
            logits = offset[b][..., None] + unit[b][..., None] * products
            peak = logits.max(axis=-1)
            scores[b, ..., p] = peak + np.log(np.exp(logits - peak[..., None]).sum(axis=-1))
    return scores


def summarize(k_pages: ArrayLike, token_counts: ArrayLike) -> Array:
    """Elementwise min and max of the first tokens of each page.

    k_pages [..., page, H], token_counts int[...] -> float64[..., 2, H]; an empty page gives zeros.
    """
    pages, counts = _float64(k_pages), np.asarray(token_counts)
    result = np.zeros((*counts.shape, 2, pages.shape[-1]))
    for index in np.ndindex(*counts.shape):
        if counts[index]:
            valid = pages[index][: counts[index]]
            result[index] = np.stack([valid.min(axis=0), valid.max(axis=0)])
    return result


def quantize(summaries: ArrayLike, *, group: int) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """8-bit summaries that stay bounds: each `group` of channels shares a power of two.

    summaries [..., 2, H] -> values int8[..., 2, H], exponents uint8[..., 2, H // group] with
    summary ~ values * 2**(exponents - 127); minima are rounded down, maxima up, and the power is
    the least of 2**-126 .. 2**127 with which the group fits into -127 .. 127.
    """
    summaries = _float64(summaries)
    shape = summaries.shape
    groups = summaries.reshape(*shape[:-1], shape[-1] // group, group)
    exponents = np.full(groups.shape[:-1], 1, np.uint8)
    values = np.zeros(groups.shape, np.int8)
    for index in np.ndindex(*groups.shape[:-1]):
        rounding = np.ceil if index[-2] == 1 else np.floor
        for biased in range(1, 255):
            scaled = groups[index] * 2.0 ** (127 - biased)
            if np.abs(scaled).max() <= 127:
                exponents[index], values[index] = biased, rounding(scaled)
                break
    return values.reshape(shape), exponents


def dequantize(values: ArrayLike, exponents: ArrayLike) -> Array:
    """Inverse of `quantize`, up to its outward rounding: float64[..., 2, H]."""
    values, exponents = _float64(values), _float64(exponents)
    return values * np.repeat(2.0 ** (exponents - 127), values.shape[-1] // exponents.shape[-1], -1)


def promote(
    slots_k: ArrayLike, slots_v: ArrayLike, host_k: ArrayLike, host_v: ArrayLike, load: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """slots[b, h, s] = host[load[b, h, s], h] wherever load is not negative.

    slots_k [B, K, H, S, page]; slots_v [B, K, S, page, H]; host_k, host_v [blocks, K, page, H];
    load int[B, K, S].
    """
    new_k, new_v = np.array(slots_k), np.array(slots_v)
    host_k, host_v, load = np.asarray(host_k), np.asarray(host_v), np.asarray(load)
    for b, h, s in zip(*np.nonzero(load >= 0), strict=True):
        new_k[b, h, :, s], new_v[b, h, s] = host_k[load[b, h, s], h].T, host_v[load[b, h, s], h]
    return new_k, new_v


def offload(
    host_k: ArrayLike,
    host_v: ArrayLike,
    slots_k: ArrayLike,
    slots_v: ArrayLike,
    store_block: ArrayLike,
    store_slot: ArrayLike,
) -> tuple[np.ndarray, np.ndarray]:
    """host[store_block[b, e], h] = slots[b, h, store_slot[b, h, e]] where neither is negative.

    host_k, host_v [blocks, K, page, H]; slots_k [B, K, H, S, page]; slots_v [B, K, S, page, H];
    store_block int[B, E]; store_slot int[B, K, E].
    """
    new_k, new_v = np.array(host_k), np.array(host_v)
    slots_k, slots_v = np.asarray(slots_k), np.asarray(slots_v)
    blocks, slots = np.asarray(store_block), np.asarray(store_slot)
    for b, h, e in np.ndindex(*slots.shape):
        if blocks[b, e] >= 0 and slots[b, h, e] >= 0:
            new_k[blocks[b, e], h] = slots_k[b, h, :, slots[b, h, e]].T
            new_v[blocks[b, e], h] = slots_v[b, h, slots[b, h, e]]
    return new_k, new_v
