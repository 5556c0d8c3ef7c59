"""Whether flexijax and `bench.pytorch_flexicache` attend to the same pages, step by step.

flexijax runs its own programs, in which nothing is changed and nothing looks. Both are fed the
tokens that flexijax generates greedily, and at every step

    stable heads     the pages named in the cache's slots must be those in PyTorch's;
    unstable heads   values of every page of the pool that PyTorch does not choose become NaN, in
                     all layers and heads at once. A step that read any of them would end in NaN.
                     So what flexijax attends lies among what PyTorch chose, and is as many pages.
                     Then those of one chosen page at a time do instead: now it must be NaN.

Where pages rank alike the rounding of float32 decides: of a model with many pages and steps some
choices at the cut fall on either side. A page may be chosen by one and not by the other where it is
at most `tie` times as far from the cut as one product of the head's own query, rounded the other
way, can bring it (`Sketch2.resolution`). It is 0 on a small model.

The steps run one at a time, which is a value of the program that requests are served with
(`Program.boundary_steps`), on copies of what they write where something was overwritten.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bench.pytorch_flexicache import FlexiCache
from flexijax.cache.cache import Cache
from flexijax.cache.selected import SelectedGroup
from flexijax.config import CacheConfig
from flexijax.engine.batch import empty_batch
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.execute import run_decode
from flexijax.engine.plan import make_program
from flexijax.engine.program import Program, Runner
from flexijax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was found. pages: how many choices were compared, those of all heads and steps.

    undecided: how many of them are so close to the cut, see `tie` above; of each the choice may be
    either. ties: how often it was the other one, of heads and reranks, and of steps.
    other: (step, layer, head) at which pages differ; -1 for what NaN told of all heads at once.
    unread: (step, layer, head, page) chosen by PyTorch, and not read by flexijax.
    logits: the largest error of a row against its norm, at most `close`. tokens: greedy, of both.
    """

    steps: int
    tie: float
    close: float
    pages: int
    undecided: int
    ties: int
    other: list[tuple[int, int, int]]
    unread: list[tuple[int, int, int, int]]
    logits: float
    tokens: tuple[list[int], list[int]]

    def wrong(self) -> list[str]:
        """What is not as it must be; nothing where all is."""
        ours, theirs = self.tokens
        found = []
        if self.other:
            found.append(f"other pages at {self.other[:4]}, {len(self.other)} in all")
        if self.unread:
            found.append(f"pages not read at {self.unread[:4]}, {len(self.unread)} in all")
        if not self.logits <= self.close:
            found.append(f"logits differ by {self.logits:.2g} of their norm, at most {self.close}")
        if ours != theirs:
            found.append(f"other greedy tokens: {ours} and {theirs}")
        return found


def agree(
    lm: LanguageModel,
    prompt: Sequence[int],
    cache: CacheConfig,
    make: Callable[[Program], FlexiCache],
    *,
    steps: int,
    unread: int,
    at_most: int | None = None,
    tie: float = 0.0,
    close: float = 1e-4,
) -> Agreement:
    """Runs both for so many steps after a prompt, whole chunks. tie, close: see `Agreement`.

    make: the peer, for what the program has settled. unread: at every so many-th step chosen pages
    are overwritten one by one, at_most so many of all heads, drawn at random; None: each of them.
    """
    program = make_program(lm, cache, max_tokens=len(prompt) + steps, max_new_tokens=steps)
    reading = read(lm, [program], prompt)
    chunk, tokens = program.chunk_steps, Continuation(lm, program, reading).greedy(steps)
    fed = Continuation(lm, program, reading)
    expected = np.concatenate([fed.first_logits[None], fed.feed(tokens)])
    flexi, watched = make(program), _Watched(lm, program, Continuation(lm, program, reading))
    found = [flexi.read(torch.tensor([list(prompt)]))[0].numpy()]
    pages, undecided, ties, other, missed = 0, 0, 0, [], []
    for step, token in enumerate(tokens):
        ours, theirs, near = watched.resident(), flexi.resident(), flexi.undecided(tie)
        newest, reranked = watched.length // program.layout.sizes.page_size, not step % chunk
        for layer, head, mine in _heads(ours):
            begun = {page for page in theirs[layer].get(head, set()) if page <= newest}
            differ = begun ^ {page for page in mine if page <= newest}
            pages += len(begun)
            undecided += len(near[layer].get(head, set()))
            ties += bool(differ) and reranked
            if differ - near[layer].get(head, set()):
                other.append((step, layer, head))
        found.append(flexi.step(torch.tensor([token]))[0].numpy())
        chosen, near = flexi.chosen(), flexi.undecided(tie)
        allowed = [
            {head: mine | near[layer].get(head, set()) for head, mine in of_layer.items()}
            for layer, of_layer in enumerate(chosen)
        ]
        pages += sum(len(mine) for *_, mine in _heads(chosen))
        undecided += sum(len(near[layer][head]) for layer, head, _ in _heads(chosen) if tie)
        if watched.reads_others(token, allowed):
            other.append((step, -1, -1))
        elif tie and watched.reads_others(token, chosen):
            ties += 1
        chosen = [
            {head: mine - near[layer].get(head, set()) for head, mine in of_layer.items()}
            for layer, of_layer in enumerate(chosen)
        ]
        asked = [
            (*at, page) for *at, mine in _heads(chosen) for page in mine if watched.holds(page)
        ]
        asked = random.Random(step).sample(asked, min(at_most or len(asked), len(asked)))
        for layer, head, page in asked if step % unread == 0 else ():
            if not watched.reads(token, layer, head, page):
                missed.append((step, layer, head, page))
        watched.step(token, ends=(step + 1) % chunk == 0)
    found = np.array(found)
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    generated = (tokens, found[:-1].argmax(-1).tolist())
    counts = (pages, undecided, ties)
    return Agreement(steps, tie, close, *counts, other, missed, float(error.max()), generated)


class _Watched:
    """flexijax, one step at a time."""

    def __init__(self, lm: LanguageModel, program: Program, begun: Continuation) -> None:
        self.cache, self.length = begun.cache, begun.length
        self._params, self._runner = lm.params, Runner(None)
        self._program = dataclasses.replace(program, boundary_steps=1)
        self._page = program.layout.sizes.page_size

    def step(self, token: int, *, ends: bool) -> None:
        """ends: whether a chunk does with this step, so that heads are reranked."""
        self.cache, _ = self._run(self.cache, token, ends)
        self.length += 1

    def resident(self) -> list[dict[int, set[int]]]:
        """Of each layer and head with slots the pages named in them."""
        found = []
        for layer, groups in enumerate(self._program.layout.groups):
            pages: dict[int, set[int]] = {}
            arrays = self.cache.layer(layer, 0).groups
            for group, mine in zip(groups, arrays, strict=True):
                if group.kind == "offloaded":
                    named = np.asarray(mine.slot_page[0]).tolist()
                    of_head = zip(group.heads, named, strict=True)
                    pages |= {head: {p for p in slots if p >= 0} for head, slots in of_head}
            found.append(pages)
        return found

    def holds(self, page: int) -> bool:
        """Whether a page holds a token before the step."""
        return page * self._page < self.length

    def reads_others(self, token: int, chosen: list[dict[int, set[int]]]) -> bool:
        """Whether the step would read any page but those of each layer and head."""

        def poison(layer: int, head: int, pages: np.ndarray) -> np.ndarray:
            return ~np.isin(pages, list(chosen[layer].get(head, set())))

        return self._ends_in_nan(token, poison)

    def reads(self, token: int, layer: int, head: int, page: int) -> bool:
        """Whether the step would read this page."""

        def poison(of: int, other: int, pages: np.ndarray) -> np.ndarray:
            return (pages == page) & ((of, other) == (layer, head))

        return self._ends_in_nan(token, poison)

    def _ends_in_nan(self, token: int, poison: Callable[..., Any]) -> bool:
        """poison: of (layer, head, pages) which pages of the pool are overwritten."""
        pools = []
        for layer, pool in enumerate(self.cache.pools):
            groups = [
                self._overwritten(layer, named.heads, group, poison)
                for named, group in zip(
                    self._program.layout.groups[layer], pool.groups, strict=True
                )
            ]
            pools.append(dataclasses.replace(pool, groups=tuple(groups)))
        banks = jax.tree.map(jnp.copy, self.cache.banks)
        _, logprob = self._run(Cache(tuple(pools), banks), token, False)
        return not np.isfinite(logprob)

    def _overwritten(
        self, layer: int, heads: tuple[int, ...], group: Any, poison: Callable[..., Any]
    ) -> Any:
        if not isinstance(group, SelectedGroup):
            return group
        pages = np.arange(group.k.shape[0])  # block b holds page b: see `Continuation`
        gone = np.stack([poison(layer, head, pages) for head in heads], axis=1)
        v = jnp.where(jnp.asarray(gone)[:, :, None, None], jnp.nan, group.v)
        return dataclasses.replace(group, k=jnp.copy(group.k), v=v)

    def _run(self, cache: Cache, token: int, ends: bool) -> tuple[Cache, float]:
        """The cache after the step, and the log-probability of what it samples."""
        state = dataclasses.replace(
            empty_batch(1),
            tokens=jnp.full(1, token, jnp.int32),
            active=jnp.ones(1, bool),
            remaining=jnp.full(1, 2, jnp.int32),
        )
        due = np.array([ends])
        made, _, sampled = run_decode(
            self._runner, self._program, self._params, cache, [0], state, due
        )
        return made, float(sampled.logprobs[0, 0])


def _heads(of_layers: list[dict[int, set[int]]]) -> Iterator[tuple[int, int, set[int]]]:
    for layer, heads in enumerate(of_layers):
        for head, pages in heads.items():
            yield layer, head, pages
