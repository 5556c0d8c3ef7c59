"""How pages are scored and chosen, in PyTorch: what `bench.pytorch_flexicache` chooses by.

Two scores, each with what it keeps of a page: a 2-bit sketch of every key, and Quest's bound from
the least and greatest value of every channel (https://arxiv.org/abs/2406.10774, equation 2).
B requests, K KV heads, G query heads of each, H channels, P pages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Best spacing of 4 evenly spaced levels for a Gaussian, in deviations: J. Max, 1960, table II.
SPACING, LEVELS, LARGEST = 0.9957, 4, 31
FIT_TOKENS, TINY = 1024, 1e-30


class Sketch2:
    """Keys rotated by Hadamard's matrix and rounded per channel to 4 levels about their mean.

    Kept: two bits a channel, four channels in a byte, uint8[B, K, P, page, ceil(H / 4)]. State:
    mean and step [B, K, H]. A query is rounded to 6 bits, so that its products are exact.
    """

    def fit(self, keys: Tensor) -> tuple[Tensor, ...]:
        """keys [B, K, T, H] of a prompt, of which the first 1,024 are read."""
        rotated = rotate(keys[:, :, :FIT_TOKENS])
        mean = rotated.mean(2)
        return mean, (rotated.std(2, correction=0) * SPACING).clamp(min=TINY)

    def summarize(self, pages: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """pages [B, K, P, page, H] -> what is kept of them."""
        mean, step = (x[:, :, None, None] for x in state)
        level = torch.floor((rotate(pages) - mean) / step) + LEVELS // 2
        level = level.clamp(0, LEVELS - 1).to(torch.uint8)
        level = torch.nn.functional.pad(level, (0, -level.shape[-1] % 4))
        level = level.unflatten(-1, (-1, 4))
        packed = level[..., 0] | level[..., 1] << 2 | level[..., 2] << 4 | level[..., 3] << 6
        return (packed,)

    def scores(self, q: Tensor, summaries: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> Tensor:
        """q [B, K, G, H] -> logs [B, K, G, P] of the attention that a page's rounded keys get."""
        (packed,), (mean, step) = summaries, state
        batch, heads, pages, page, _ = packed.shape
        rotated = rotate(q) * q.shape[-1] ** -0.5
        exact = rotated * step[:, :, None]
        unit = exact.abs().amax(-1, keepdim=True).clamp(min=TINY) / LARGEST
        weights = torch.round(exact / unit)
        middle = unit * weights.sum(-1, keepdim=True) * ((LEVELS - 1) / 2)
        offset = (rotated * mean[:, :, None]).sum(-1, keepdim=True) - middle
        levels = torch.stack([packed >> 2 * at & 3 for at in range(4)], dim=-1)
        levels = levels.flatten(-2)[..., : q.shape[-1]].to(q.dtype)
        products = weights @ levels.view(batch, heads, pages * page, -1).transpose(-1, -2)
        logits = (offset + unit * products).unflatten(-1, (pages, page))
        return torch.logsumexp(logits, dim=-1)

    def resolution(self, q: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Nats [B, K] that a page's rank may change by where float32 rounds another way.

        A product of a query falls on the other side when it is rounded to 6 bits. Then the logit of
        a token changes by a unit for each level between its key's and the middle, at most 1.5.
        """
        exact = rotate(q) * q.shape[-1] ** -0.5 * state[1][:, :, None]
        return exact.abs().amax((-1, -2)) / LARGEST * ((LEVELS - 1) / 2)


class MinMax:
    """An upper bound of q.k over a page. Kept: least and greatest value, [B, K, P, H] each."""

    def fit(self, keys: Tensor) -> tuple[Tensor, ...]:
        """There is no state."""
        return ()

    def summarize(self, pages: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """pages [B, K, P, page, H] -> what is kept of them."""
        return pages.amin(-2), pages.amax(-2)

    def scores(self, q: Tensor, summaries: tuple[Tensor, ...], state: tuple[Tensor, ...]) -> Tensor:
        """q [B, K, G, H] -> the bound [B, K, 1, P], the greatest of the query heads'."""
        low, high = (x[:, :, None] for x in summaries)
        # max(q * high, q * low) summed: of each channel the end that the sign of q points to.
        bound = (
            q.clamp(min=0) @ high.transpose(-1, -2)[:, :, 0]
            + q.clamp(max=0) @ low.transpose(-1, -2)[:, :, 0]
        )
        return bound.amax(2, keepdim=True)

    def resolution(self, q: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Nothing is rounded."""
        return torch.zeros(q.shape[:2])


SCORES: dict[str, Sketch2 | MinMax] = {"sketch2": Sketch2(), "minmax": MinMax()}


def rotate(x: Tensor) -> Tensor:
    """x [..., H] times Hadamard's matrix, made orthogonal; one for each block of 2^n channels."""
    width = x.shape[-1]
    block = width & -width
    x = x.unflatten(-1, (-1, block))
    span = 1
    while span < block:
        one, two = x.unflatten(-1, (-1, 2, span)).unbind(-2)
        x = torch.stack([one + two, one - two], dim=-2).flatten(-3)
        span *= 2
    return x.flatten(-2) / math.sqrt(block)


def page_ranks(scores: Tensor, scored: Tensor) -> Tensor:
    """[B, K, G, P] -> [B, K, P], -inf from page `scored` on.

    One score is the rank; of several, logs of attention mass, it is the log of the mean share.
    """
    page = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(page >= scored, -math.inf)
    if scores.shape[2] == 1:
        return scores[:, :, 0]
    shares = torch.log_softmax(scores, dim=-1)
    # Where no page has a score the shares are no numbers.
    return torch.logsumexp(shares, dim=2).nan_to_num(nan=-math.inf, neginf=-math.inf)


def choose(
    ranks: Tensor, length: Tensor, scored: Tensor, page: int, count: int, newer: int
) -> Tensor:
    """The pages int64[B, K, n] that are attended, -1 for none: the first, the tail, the best.

    The tail is the newest page and all from page `scored` on. Of it `newer` pages, those behind
    its first one, come beside the count. Of equal ranks the lower page goes first.
    """
    pages = ranks.shape[-1]
    at = torch.arange(pages, device=ranks.device)
    begun = (length + page - 1) // page
    tail = torch.minimum(scored, begun - 1)
    always = (at == 0) | ((at >= tail) & (at < begun))
    ranks = torch.where(always, math.inf, ranks.masked_fill(at >= begun, -math.inf))
    ranks, order = torch.sort(ranks, dim=-1, descending=True, stable=True)
    most = min(count + newer, pages)
    room = count + (begun - 1 - tail).clamp(0, newer)
    there = (at[:most] < room) & (ranks[..., :most] > -math.inf)
    return torch.where(there, order[..., :most], -1)


def close_to_cut(ranks: Tensor, chosen: set[int], tie: float) -> set[int]:
    """Pages that `tie` more or less in their rank [P] would have chosen, or not chosen.

    Those that are always attended are not among them, as far as they have no rank; nor is page 0.
    """
    ranked = [(rank, page) for page, rank in enumerate(ranks.tolist()) if page and rank > -math.inf]
    inside = [rank for rank, page in ranked if page in chosen]
    outside = [rank for rank, page in ranked if page not in chosen]
    if not inside or not outside:
        return set()
    low, high = min(inside) - tie, max(outside) + tie
    return {page for rank, page in ranked if (rank <= high if page in chosen else rank >= low)}
