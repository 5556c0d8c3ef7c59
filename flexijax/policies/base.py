"""Policies: which heads keep all pages on the device, which pages a step reads, what is reranked.

A policy is a small frozen dataclass of pure functions. The mechanism (cache, tiers, attention,
decode) asks it and knows no policy by name; a new one is a class with these methods.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from flexijax.config import CacheConfig
from flexijax.policies.intervals import Adaptive
from flexijax.policies.minmax import MinMax
from flexijax.policies.score import Score
from flexijax.policies.sketch import Sketch
from flexijax.profiles.head_profile import HeadProfile


def forced(scores: jax.Array, lengths: jax.Array, *, page_size: int) -> jax.Array:
    """Scores with the first page (attention sink) and the newest page at +inf.

    scores: float32[B, K, P]; lengths: int32[B]. A free row stays at -inf everywhere.
    """
    page = jnp.arange(scores.shape[-1])[None, :]
    newest = lax.div(lengths - 1, page_size)
    keep = ((page == 0) | (page == newest[:, None])) & (lengths > 0)[:, None]
    return jnp.where(keep[:, None, :], jnp.inf, scores)


def top_pages(scores: jax.Array, count: int) -> jax.Array:
    """int32[B, K, n]: the pages of the n = min(count, P) greatest scores, -1 where none is left."""
    best, page = lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.where(best > -jnp.inf, page, -1).astype(jnp.int32)


class Policy(Protocol):
    """What the mechanism asks of a method."""

    @property
    def score(self) -> Score | None:
        """How pages are scored; None when no head ever chooses."""
        ...

    @property
    def offloads(self) -> bool:
        """Whether slotted heads keep their pages on the host and are reranked."""
        ...

    @property
    def intervals(self) -> Adaptive | None:
        """How each slotted head's rerank interval changes; None: all are reranked every chunk."""
        ...

    def paged_heads(self, layer: int, num_kv_heads: int) -> tuple[int, ...]:
        """KV heads of a layer that keep every page on the device and choose at every step."""
        ...

    def slots(self, pages: int) -> int:
        """Pages that a slotted head has room for when a request has up to `pages`."""
        ...

    def select(self, scores: jax.Array) -> jax.Array:
        """Pages a step reads for paged heads: scores float32[B, K, P] -> int32[B, K, n]."""
        ...

    def plan(self, scores: jax.Array) -> jax.Array:
        """Pages of slotted heads to be resident after a rerank: as `select`."""
        ...


@dataclasses.dataclass(frozen=True)
class Full:
    """Dense attention: every page of every head in a slot of its own, nothing chosen."""

    score: None = None
    offloads: bool = False
    intervals: None = None

    def paged_heads(self, layer: int, num_kv_heads: int) -> tuple[int, ...]:
        """None: see `Policy`."""
        return ()

    def slots(self, pages: int) -> int:
        """All: see `Policy`."""
        return pages

    def select(self, scores: jax.Array) -> jax.Array:
        """Never asked: no head is paged."""
        raise AssertionError("mode full has no paged heads")

    def plan(self, scores: jax.Array) -> jax.Array:
        """Never asked: nothing is offloaded."""
        raise AssertionError("mode full has nothing to rerank")


@dataclasses.dataclass(frozen=True)
class Quest:
    """All pages of all heads on the device; every head chooses at every step."""

    score: Score
    budget_pages: int
    offloads: bool = False
    intervals: None = None

    def paged_heads(self, layer: int, num_kv_heads: int) -> tuple[int, ...]:
        """All: see `Policy`."""
        return tuple(range(num_kv_heads))

    def slots(self, pages: int) -> int:
        """None: see `Policy`."""
        return 0

    def select(self, scores: jax.Array) -> jax.Array:
        """The budget's best pages: see `Policy`."""
        return top_pages(scores, self.budget_pages)

    def plan(self, scores: jax.Array) -> jax.Array:
        """Never asked: no head is slotted."""
        raise AssertionError("mode quest has nothing to rerank")


@dataclasses.dataclass(frozen=True)
class Flexi:
    """FlexiCache: unstable heads as `Quest`, stable heads by periodic rerank from the host.

    unstable: per layer, the KV heads that choose at every step. tail_pages: the most pages that
    can begin between two reranks. intervals: see `Policy`. Source:
    https://arxiv.org/abs/2511.00868.
    """

    score: Score
    unstable: tuple[tuple[int, ...], ...]
    budget_pages: int
    tail_pages: int
    offloads: bool = True
    intervals: Adaptive | None = None

    def paged_heads(self, layer: int, num_kv_heads: int) -> tuple[int, ...]:
        """The unstable ones: see `Policy`."""
        return self.unstable[layer]

    def slots(self, pages: int) -> int:
        """The budget and the tail: see `Policy`."""
        return min(pages, self.budget_pages + self.tail_pages)

    def select(self, scores: jax.Array) -> jax.Array:
        """The budget's best pages: see `Policy`."""
        return top_pages(scores, self.budget_pages)

    def plan(self, scores: jax.Array) -> jax.Array:
        """The budget's best pages: see `Policy`."""
        return top_pages(scores, self.budget_pages)


def make(
    config: CacheConfig, *, profile: HeadProfile | None, num_layers: int, dtype: str
) -> Policy:
    """The policy that `config.mode` names; the only place that knows the names.

    dtype: of keys and values, which summaries follow unless the config says otherwise.
    Raises ValueError when mode "flexi" comes without a profile, or for summaries in float16 of keys
    in another dtype.
    """
    if config.mode == "full":
        return Full()
    score = make_score(config, dtype)
    if config.mode == "quest":
        return Quest(score, config.budget_pages)
    if profile is None:
        raise ValueError("mode='flexi' needs a head profile: pass profile=HeadProfile or its name")
    unstable = tuple(profile.unstable_heads(layer) for layer in range(num_layers))
    return Flexi(
        score, unstable, config.budget_pages, config.tail_pages, intervals=config.intervals
    )


def make_score(config: CacheConfig, dtype: str) -> Score:
    """What `config.score` names; dtype and errors: see `make`."""
    if config.score == "minmax":
        summary_dtype = config.summary_dtype or dtype
        if summary_dtype == "float16" and dtype != "float16":
            raise ValueError(
                f"summary_dtype='float16' ends at 65504, and keys in {dtype} do not: beyond it a "
                "bound would be infinite and its product with 0 no number; take 'bfloat16' or "
                "'int8'"
            )
        return MinMax(summary_dtype)
    return Sketch(bits=int(config.score.removeprefix("sketch")), page_size=config.page_size)
