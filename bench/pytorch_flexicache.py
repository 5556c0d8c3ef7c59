"""FlexiCache in PyTorch, compact, written from the formulas: a peer to time, an oracle to ask.

Unstable KV heads keep every page and choose at every step. Stable heads keep their chosen pages in
slots, every page in host memory, and choose again every `interval` steps. Formulas: how pages
score, `docs/policies.md`; what is always attended and when heads are reranked,
`docs/how-it-works.md`. Nothing of flexijax is imported. All requests of a batch are equally long.

    flexi = FlexiCache(model, Settings(unstable=...), room=len(prompt) + 64)
    logits = flexi.read(torch.tensor([prompt]))       # float[B, V]
    logits = flexi.step(logits.argmax(-1))            # one token more
    flexi.chosen()[layer][head]                       # pages that an unstable head attended
"""

from __future__ import annotations

import math
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.pytorch_decoder import after_attention, project, weights_of
from bench.pytorch_groups import Settings, Stable, Unstable, by_head
from bench.pytorch_scores import FIT_TOKENS, SCORES, choose, close_to_cut, page_ranks


def can_compile() -> str | None:
    """Why `torch.compile` cannot be used on this machine; None where it can."""
    if torch.cuda.is_available() or any(map(shutil.which, ("g++", "clang++"))):
        return None
    return "torch.compile needs a C++ compiler (g++ or clang++) on a CPU, and none is installed"


class FlexiCache:
    """A Llama, Mistral or Qwen model of transformers with such a cache.

    room: the most tokens of a request. compiled: decode steps by `torch.compile`; raises
    RuntimeError where there is no compiler.
    """

    def __init__(self, model: Any, settings: Settings, *, room: int, compiled: bool = False):
        if compiled and (why := can_compile()) is not None:
            raise RuntimeError(why)
        config = model.config
        self.model, self.settings = model, settings
        self.eps = config.rms_norm_eps
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.shape = (kv_heads, heads // kv_heads, width)
        self.pages = -(-room // settings.page)
        self.weights = [weights_of(layer) for layer in model.model.layers]
        self.groups: list[tuple[Unstable | None, Stable | None]] = []
        self.length = self.settled = 0
        self.queries: list[Tensor] = []  # of the last token, of each layer [B, K, G, H]
        self._chosen: list[Tensor | None] = []
        self._ranks: list[Tensor | None] = []
        self._layer = torch.compile(decode_layer, dynamic=False) if compiled else decode_layer

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Reads prompts int64[B, T] with full attention; logits float[B, V] of what comes next.

        Raises ValueError for prompts shorter than the budget in a cache with more room than it:
        scores would be fitted anew.
        """
        settings, (batch, length) = self.settings, tokens.shape
        if length < min(settings.budget_tokens, FIT_TOKENS) and self.pages > settings.pages:
            raise ValueError(f"{length} tokens of a prompt are fewer than the budget")
        self.length = self.settled = length
        self.groups, self.queries = [], []
        self._chosen, self._ranks = [None] * len(self.weights), [None] * len(self.weights)
        x = self.model.model.embed_tokens(tokens)
        cos, sin = self.model.model.rotary_emb(x, torch.arange(length, device=x.device)[None])
        for weights, unstable in zip(self.weights, settings.unstable, strict=True):
            q, k, v = project(weights, x, self.shape, self.eps, cos, sin)
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = after_attention(weights, x, out.transpose(1, 2).flatten(2), self.eps)
            last = q[:, :, -1].reshape(batch, *self.shape)
            self.queries.append(last)
            self.groups.append(self._commit(unstable, k, v, last))
        return self._logits(x[:, -1:])

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Takes one token of each request, int64[B]; logits float[B, V] of the one after it."""
        settings = self.settings
        x = self.model.model.embed_tokens(tokens[:, None])
        at = torch.tensor(self.length, device=x.device)
        scored = torch.tensor(self.settled // settings.page, device=x.device)
        cos, sin = self.model.model.rotary_emb(x, at[None, None])
        self._chosen, self._ranks = [], []
        for layer, (weights, groups) in enumerate(zip(self.weights, self.groups, strict=True)):
            x, pages, ranks, self.queries[layer] = self._layer(
                settings, self.shape, self.eps, weights, groups, x, cos, sin, at, scored
            )
            self._chosen.append(pages)
            self._ranks.append(ranks)
        self.length += 1
        if self.length - self.settled == settings.interval:
            self._rerank()
        return self._logits(x)

    def chosen(self) -> list[dict[int, set[int]]]:
        """Of each layer and unstable head the pages that request 0 attended in the last step."""
        return [by_head(*of) for of in zip((u for u, _ in self.groups), self._chosen, strict=True)]

    def resident(self) -> list[dict[int, set[int]]]:
        """Of each layer and stable head the pages in request 0's slots, those that begin too."""
        return [by_head(stable, stable and stable.slot_page) for _, stable in self.groups]

    def undecided(self, tie: float) -> list[dict[int, set[int]]]:
        """Pages of request 0 whose rank is close to the cut, on either side of it.

        Within `tie` times what rounding a query another way changes it by, see `resolution` of a
        score. Of the last step of unstable heads, and of the last rerank of stable ones.
        """
        score, found = SCORES[self.settings.score], []
        for (unstable, stable), ranks, pages, q in zip(
            self.groups, self._ranks, self._chosen, self.queries, strict=True
        ):
            near: dict[int, set[int]] = {}
            both: list[Any] = []
            if unstable is not None and pages is not None:
                nats = score.resolution(q[:, unstable.heads], unstable.state)
                both.append((unstable, ranks, nats, pages))
            if stable is not None:
                both.append((stable, stable.ranks, stable.resolution, stable.slot_page))
            for group, by, nats, named in both:
                for at, (head, mine) in enumerate(by_head(group, named).items()):
                    near[head] = close_to_cut(by[0, at], mine, tie * float(nats[0, at]))
            found.append(near)
        return found

    def kv_bytes(self) -> int:
        """Of all requests, in bytes: slots, pages of unstable heads, summaries; not the host's."""
        tensors = []
        for unstable, stable in self.groups:
            for group in (unstable, stable):
                if group is not None:
                    tensors += [group.k, group.v, *group.summaries, *group.state]
        return sum(one.nbytes for one in tensors)

    def _logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x))[:, -1]

    def _commit(
        self, unstable: tuple[int, ...], k: Tensor, v: Tensor, q: Tensor
    ) -> tuple[Unstable | None, Stable | None]:
        """k, v [B, K, T, H] of a prompt into pages; the last queries q [B, K, G, H] fill slots."""
        settings, score = self.settings, SCORES[self.settings.score]
        batch, kv_heads, length, width = k.shape
        room = self.pages * settings.page

        def pages(x: Tensor, heads: Tensor) -> Tensor:
            x = F.pad(x[:, heads], (0, 0, 0, room - length))
            return x.view(batch, len(heads), self.pages, settings.page, width)

        found: list[Any] = []
        stable = tuple(head for head in range(kv_heads) if head not in unstable)
        for named in (unstable, stable):
            if not named:
                found.append(None)
                continue
            heads = torch.tensor(named, device=k.device)
            mine_k, mine_v = pages(k, heads), pages(v, heads)
            state = score.fit(k[:, heads])
            summaries = score.summarize(mine_k, state)
            if named is unstable:
                found.append(Unstable(heads, mine_k, mine_v, state, summaries))
                continue
            slots = min(settings.pages + settings.newer, self.pages)
            empty = torch.zeros(batch, len(named), slots, settings.page, width, dtype=k.dtype)
            slot_page = torch.full((batch, len(named), slots), -1)
            group = Stable(heads, empty, empty.clone(), slot_page, mine_k, mine_v, state, summaries)
            self._fill(group, q[:, heads])
            group.promoted = 0
            found.append(group)
        return found[0], found[1]

    def _rerank(self) -> None:
        """After `interval` steps: pages that filled up are summarised, stable heads choose anew."""
        settings, score = self.settings, SCORES[self.settings.score]
        first, last = self.settled // settings.page, self.length // settings.page
        self.settled = self.length
        for (unstable, stable), q in zip(self.groups, self.queries, strict=True):
            if unstable is not None:
                new = score.summarize(unstable.k[:, :, first:last], unstable.state)
                for kept, made in zip(unstable.summaries, new, strict=True):
                    kept[:, :, first:last] = made
            if stable is None:
                continue
            for page in range(first, last):
                at = (stable.slot_page == page).int().argmax(-1)[:, :, None, None, None]
                at = at.expand(-1, -1, 1, *stable.k.shape[3:])
                stable.host_k[:, :, page] = stable.k.gather(2, at)[:, :, 0]
                stable.host_v[:, :, page] = stable.v.gather(2, at)[:, :, 0]
            new = score.summarize(stable.host_k[:, :, first:last], stable.state)
            for kept, made in zip(stable.summaries, new, strict=True):
                kept[:, :, first:last] = made
            self._fill(stable, q[:, stable.heads])

    def _fill(self, group: Stable, q: Tensor) -> None:
        """What q [B, K, G, H] chooses into the slots; what is there already keeps its slot."""
        settings, score = self.settings, SCORES[self.settings.score]
        length = torch.tensor(self.length)
        full, newest = self.length // settings.page, (self.length - 1) // settings.page
        scores = score.scores(q, group.summaries, group.state)
        ranks = page_ranks(scores, torch.tensor(full))
        group.ranks = ranks.masked_fill(torch.arange(self.pages) >= newest, -math.inf)
        group.resolution = score.resolution(q, group.state)
        chosen = choose(ranks, length, torch.tensor(full), settings.page, settings.pages, 0)
        for row, head in torch.cartesian_prod(*map(torch.arange, group.slot_page.shape[:2])):
            slots = group.slot_page[row, head]
            wanted = {page for page in chosen[row, head].tolist() if page >= 0}
            resident = {page for page in slots.tolist() if 0 <= page <= newest}
            free = [at for at, page in enumerate(slots.tolist()) if page not in wanted & resident]
            missing = sorted(wanted - resident)
            coming = [*missing, *range(newest + 1, self.pages)][: len(free)]
            slots[free] = torch.tensor(coming + [-1] * (len(free) - len(coming)))
            group.k[row, head, free[: len(missing)]] = group.host_k[row, head, missing]
            group.v[row, head, free[: len(missing)]] = group.host_v[row, head, missing]
            group.promoted += len(missing)


def decode_layer(
    settings: Settings,
    shape: tuple[int, int, int],
    eps: float,
    weights: dict[str, Any],
    groups: tuple[Unstable | None, Stable | None],
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Tensor,
    scored: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """One token x [B, 1, D] at position `at` through a layer: (x, pages, ranks, q).

    scored: how many pages have a summary. pages: of unstable heads, int64[B, K, n], -1 for none,
    and the ranks [B, K, P] they are chosen by. q: [B, K, G, H].
    """
    unstable, stable = groups
    q, k, v = project(weights, x, shape, eps, cos, sin)
    batch, (kv_heads, group, width), page = len(x), shape, settings.page
    q = q.view(batch, kv_heads, group, width)
    out, chosen, ranks, length = torch.empty_like(q), None, None, at + 1
    if unstable is not None:
        heads = unstable.heads
        unstable.k.flatten(2, 3).index_copy_(2, at[None], k[:, heads])
        unstable.v.flatten(2, 3).index_copy_(2, at[None], v[:, heads])
        scores = SCORES[settings.score].scores(q[:, heads], unstable.summaries, unstable.state)
        ranks = page_ranks(scores, scored)
        chosen = choose(ranks, length, scored, page, settings.pages, settings.newer)
        index = chosen.clamp(min=0)[..., None, None].expand(-1, -1, -1, page, width)
        keys, values = unstable.k.gather(2, index), unstable.v.gather(2, index)
        out[:, heads] = attend(q[:, heads], keys, values, chosen, length)
    if stable is not None:
        heads = stable.heads
        slot = (stable.slot_page == at // page).int().argmax(-1)
        place = (slot * page + at % page)[..., None, None].expand(-1, -1, 1, width)
        stable.k.flatten(2, 3).scatter_(2, place, k[:, heads])
        stable.v.flatten(2, 3).scatter_(2, place, v[:, heads])
        out[:, heads] = attend(q[:, heads], stable.k, stable.v, stable.slot_page, length)
    return after_attention(weights, x, out.flatten(1)[:, None], eps), chosen, ranks, q


def attend(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, length: Tensor) -> Tensor:
    """q [B, K, G, H] over the tokens before `length` in pages [B, K, n, page, H]; -1: not there."""
    token = pages[..., None] * k.shape[3] + torch.arange(k.shape[3], device=k.device)
    mask = ((token < length) & (pages >= 0)[..., None]).flatten(2)[:, :, None]
    return F.scaled_dot_product_attention(q, k.flatten(2, 3), v.flatten(2, 3), attn_mask=mask)
