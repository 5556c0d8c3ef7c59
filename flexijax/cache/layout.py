"""Every static size of a cache, and what the programs over one layer are compiled for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from flexijax.cache.head_split import LayerSplit
from flexijax.models.config import AttentionShape
from flexijax.policies.base import HOST, HeadGroup, Policy
from flexijax.policies.codec import Codec
from flexijax.policies.page_score import PageScore, PageShape


@dataclasses.dataclass(frozen=True)
class CacheSizes:
    """What is the same in every layer.

    shape: of the model. batch: requests at once (B). blocks: rows of each pool. pages: the most
    pages of one request (P). page_size: tokens. dtype: of keys and values. chunk_steps: decode
    steps of one program, after which heads are reranked and tokens evicted (R). bank: rows whose
    arrays are one, a divisor of B; None: all of them.
    """

    shape: AttentionShape
    batch: int
    blocks: int
    pages: int
    page_size: int
    dtype: str
    chunk_steps: int
    bank: int | None = None

    @property
    def bank_rows(self) -> int:
        """Rows of a bank."""
        return self.bank or self.batch

    @property
    def banks(self) -> int:
        """How many there are."""
        return self.batch // self.bank_rows

    @property
    def page(self) -> PageShape:
        """What a page of one KV head is made of."""
        return PageShape(self.page_size, self.shape.head_dim, self.dtype)

    @property
    def max_tokens(self) -> int:
        """The most tokens of one request."""
        return self.pages * self.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one page of one KV head."""
        return 2 * self.page_size * self.shape.head_dim * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class CacheLayout:
    """Sizes and, per layer, the head groups; hashable, so programs are compiled once per layout.

    splits: where this is the layout of each shard of a mesh, which heads of the model each has.
    """

    sizes: CacheSizes
    groups: tuple[tuple[HeadGroup, ...], ...]
    splits: tuple[LayerSplit, ...] | None = None

    def of_rows(self, rows: int) -> CacheLayout:
        """The same of so many rows: what a program over some of the banks is compiled for."""
        return dataclasses.replace(self, sizes=dataclasses.replace(self.sizes, batch=rows))

    def all_groups(self) -> Iterator[tuple[int, int, HeadGroup]]:
        """(layer, place in its layer, group) of every group."""
        for layer, groups in enumerate(self.groups):
            for at, group in enumerate(groups):
                yield layer, at, group

    @property
    def moved_page_bytes(self) -> int:
        """Bytes of a page of one KV head on the host, and on its way there or back."""
        tiers = (group.ladder[-1] for *_, group in self.all_groups())
        on_host = next((tier for tier in tiers if tier.memory == HOST), None)
        return page_bytes(self.sizes, None if on_host is None else on_host.codec)

    def heads_of(self, kind: str) -> int:
        """KV heads of all layers that are kept in groups of that kind, see `HeadGroup`."""
        return sum(len(group.heads) for *_, group in self.all_groups() if group.kind == kind)


@dataclasses.dataclass(frozen=True)
class GroupProgram:
    """The static part of what runs over one head group; a static argument of jitted functions.

    group: without its heads (see `without_heads`), so that layers whose groups differ in nothing
    else share a program. policy: asked for ranks. implementation, transfer: of kernels and moves.
    """

    sizes: CacheSizes
    group: HeadGroup
    policy: Policy
    implementation: str | None
    transfer: str | None

    @property
    def score(self) -> PageScore:
        """Of a group whose pages are chosen; `HeadGroup` has seen to it that there is one."""
        assert self.group.score is not None
        return self.group.score

    @property
    def slots(self) -> int:
        """Pages that fit into a head's own buffer, see `slots_of`."""
        return slots_of(self.group, self.sizes)


def tail_pages(sizes: CacheSizes) -> int:
    """Pages that are not full when a chunk begins, and can begin in it."""
    return -(-sizes.chunk_steps // sizes.page_size) + 1


def page_bytes(sizes: CacheSizes, codec: Codec | None) -> int:
    """Bytes of the keys and values of one page of one KV head, coded or not."""
    return sizes.page_bytes if codec is None else codec.page_bytes(sizes.page)


def without_heads(group: HeadGroup) -> HeadGroup:
    """The group with no heads named: what it has in common with others of its kind."""
    source = None if group.source is None else (0, ())
    return dataclasses.replace(group, heads=(), source=source)


def slots_of(group: HeadGroup, sizes: CacheSizes) -> int:
    """Pages of device memory for each head with a buffer of its own: its room, and what comes.

    dense: every page of a request. offloaded: the room, and the pages that can begin before a
    head's next rerank; the page being filled at a rerank is in the room. evicting: pages that hold
    the room's tokens and those of one chunk.
    """
    if group.room is None:
        return sizes.pages
    if group.kind == "offloaded":
        longest = sizes.chunk_steps if group.schedule is None else group.schedule.longest
        wanted = group.room + -(-longest // sizes.page_size)
    else:
        wanted = -(-(group.room + sizes.chunk_steps) // sizes.page_size)
    return min(sizes.pages, wanted)
