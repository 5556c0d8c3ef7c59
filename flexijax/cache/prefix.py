"""Blocks of prompts that were read before: found by their tokens, kept until memory is needed.

A trie of full pages. A block that no request holds any more stays in it, still counts as free, and
is given away, least recently used chain first and ends before what they follow, only when an
allocation needs it. Only what prefill wrote may be inserted: what decoding wrote came from sparse
attention and is the request's own.
"""

from __future__ import annotations

import dataclasses
import heapq
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

from flexijax.cache.blocks import BlockAllocator


@dataclasses.dataclass
class PrefixCounts:
    """What reuse was worth so far.

    hits, misses: requests that began with known blocks, and the others. hit_tokens: not computed,
    of prompt_tokens. evicted: blocks forgotten because memory was needed.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    prompt_tokens: int = 0
    evicted: int = 0


@dataclasses.dataclass(eq=False, slots=True)
class _Node:
    """A full page of a known prompt; a salt's root has no block. used: when it was let go last."""

    key: bytes
    block: int
    parent: _Node | None
    children: dict[bytes, _Node] = dataclasses.field(default_factory=dict)
    used: int = 0


class PrefixIndex:
    """Allocates, shares and releases as the allocator below it does, and knows what blocks hold.

    page_size: tokens of a block. grid: hits are multiples of so many tokens, None for page_size,
    so that what follows one is read in the chunks that a miss is read in. fewest: shorter hits are
    none, in tokens. While an index stands over an allocator, use the index alone.
    Raises ValueError for a grid that is not whole pages.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        *,
        page_size: int,
        grid: int | None = None,
        fewest: int = 0,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1")
        grid = page_size if grid is None else grid
        if grid < 1 or grid % page_size:
            raise ValueError(f"grid={grid} must be a multiple of page_size={page_size}")
        if fewest < 0:
            raise ValueError(f"fewest={fewest} must not be negative")
        self.page_size, self.grid, self.fewest = page_size, grid, fewest
        self.counts = PrefixCounts()
        self._allocator = allocator
        # A child is found below its parent and a chain below its salt, so even equal hashes could
        # not mix them up. The index holds one reference to the block of each node.
        self._roots: dict[str, _Node] = {}
        self._nodes: dict[int, _Node] = {}
        self._idle: set[int] = set()  # blocks that the index alone holds
        self._ends: list[tuple[int, int]] = []  # heap of (used, block); some no longer idle ends
        self._clock = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now: every one that no request holds."""
        return self._allocator.num_free + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks whose tokens are known, held by requests or not."""
        return len(self._nodes)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return 0 <= count <= self.num_free

    def match(
        self, tokens: Sequence[int], salt: str = "", *, hashes: Sequence[bytes] | None = None
    ) -> list[int]:
        """Blocks of the longest known chain that a prompt begins with; changes nothing.

        At most all but the prompt's last token, which has to be computed. The blocks are only
        certain until the next `allocate`: `acquire` them first. hashes: all `block_hashes` of the
        prompt, where the caller asks again and again and keeps them: they are nearly all the time.
        """
        most = max(len(tokens) - 1, 0) // self.page_size
        made = block_hashes(tokens, page_size=self.page_size, salt=salt)
        path = self._walk(made if hashes is None else hashes, salt)[1:][:most]
        pages = len(path) * self.page_size // self.grid * self.grid // self.page_size
        if pages * self.page_size < self.fewest:
            return []
        return [node.block for node in path[:pages]]

    def acquire(self, blocks: list[int], prompt_tokens: int) -> None:
        """References to what `match` found for a request, and the count of a hit or a miss.

        Raises ValueError when one of the blocks is free; nothing is counted then.
        """
        self.share(blocks)
        self.counts.hits += bool(blocks)
        self.counts.misses += not blocks
        self.counts.hit_tokens += len(blocks) * self.page_size
        self.counts.prompt_tokens += prompt_tokens

    def insert(self, tokens: Sequence[int], blocks: Sequence[int], salt: str = "") -> None:
        """Makes a prompt known that has been read; its full pages lie in the first of `blocks`.

        Where the same tokens are known already, their block stays the known one.
        Raises ValueError when blocks are missing, free or known for other tokens; nothing is
        inserted then.
        """
        full = len(tokens) // self.page_size
        if len(blocks) < full:
            raise ValueError(
                f"{len(tokens)} tokens are {full} full pages of {self.page_size} tokens, and "
                f"{len(blocks)} blocks are given"
            )
        hashes = list(block_hashes(tokens, page_size=self.page_size, salt=salt))
        path = self._walk(hashes, salt)
        known = max(len(path) - 1, 0)
        fresh = list(blocks[known:full])
        for block, times in Counter(fresh).items():
            if times > 1 or block in self._nodes:
                raise ValueError(f"block {block} holds other tokens of a prompt already")
        if not fresh:
            return
        self._allocator.share(fresh)
        node = path[-1] if path else self._roots.setdefault(salt, _Node(b"", -1, None))
        for key, block in zip(hashes[known:], fresh, strict=True):
            node.children[key] = self._nodes[block] = _Node(key, block, parent=node)
            node = node.children[key]

    def allocate(self, count: int) -> list[int]:
        """Blocks with one reference each, evicting where that is needed.

        Raises ValueError when fewer are free; nothing is taken or evicted then.
        """
        if not self.can_allocate(count):
            raise ValueError(f"{count} blocks asked for, {self.num_free} of them free")
        while self._allocator.num_free < count:
            self._evict()
        return self._allocator.allocate(count)

    def share(self, blocks: list[int]) -> None:
        """Adds a reference to each block. Raises ValueError when one is free; adds none then."""
        self._allocator.share(blocks)
        self._idle.difference_update(blocks)

    def release(self, blocks: list[int]) -> None:
        """Gives one reference of each block back; those whose tokens are known stay so.

        Raises ValueError when a request holds no reference to one; none is given back then.
        """
        for block, times in Counter(blocks).items():
            if block in self._nodes and self._allocator.references(block) - 1 < times:
                raise ValueError(f"block {block} is not in use {times} times")
        self._allocator.release(blocks)
        self._clock += 1
        for block in blocks:
            node = self._nodes.get(block)
            if node is not None and self._allocator.references(block) == 1:
                self._idle.add(block)
                node.used = self._clock
                self._offer(node)

    def forget_all(self) -> None:
        """Forgets what every block holds, as when the arrays are made anew.

        Blocks that a request holds stay its own.
        """
        for root in self._roots.values():
            for node in list(root.children.values()):
                self._forget(node)
        self._roots.clear()

    def _walk(self, hashes: Iterable[bytes], salt: str) -> list[_Node]:
        """The salt's root and the nodes below it that follow the hashes; [] for a new salt."""
        node = self._roots.get(salt)
        path = [] if node is None else [node]
        for key in hashes if node else ():
            node = path[-1].children.get(key)
            if node is None:
                break
            path.append(node)
        return path

    def _offer(self, node: _Node) -> None:
        """Puts a node that may have become an idle end where `_evict` looks for one."""
        if node.block in self._idle and not node.children:
            heapq.heappush(self._ends, (node.used, node.block))
            if len(self._ends) > 2 * self._allocator.num_blocks:  # most are outdated
                self._ends = [entry for entry in set(self._ends) if self._is_end(*entry)]
                heapq.heapify(self._ends)

    def _is_end(self, used: int, block: int) -> bool:
        """Whether the block is idle since then, and ends its chain."""
        node = self._nodes.get(block)
        return block in self._idle and node is not None and not node.children and node.used == used

    def _evict(self) -> None:
        """Frees at least one block that no request holds."""
        while self._ends:
            used, block = heapq.heappop(self._ends)
            if self._is_end(used, block):
                return self._forget(self._nodes[block])
        # Below every idle page requests hold others: they keep those, which are found no more.
        idle = [self._nodes[block] for block in self._idle]
        node = None
        while idle:
            node = min(idle, key=lambda node: (node.used, node.block))
            idle = [below for below in node.children.values() if below.block in self._idle]
        assert node is not None, "the caller has counted what is free"
        self._forget(node)

    def _forget(self, node: _Node) -> None:
        """Takes a node out, and before it all that follow it."""
        below = [node]
        for at in below:  # grows while it is walked: parents before their children
            below.extend(at.children.values())
        for at in reversed(below):
            assert at.parent is not None, "a root is never evicted"
            del at.parent.children[at.key], self._nodes[at.block]
            self._idle.discard(at.block)
            self._allocator.release([at.block])
        self.counts.evicted += len(below)
        parent = node.parent
        assert parent is not None
        if parent.parent is not None:
            self._offer(parent)
        elif not parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}


def block_hashes(tokens: Sequence[int], *, page_size: int, salt: str) -> Iterator[bytes]:
    """SHA-256 of each full page: over its parent's hash (32 bytes, zeros first), its token ids (8
    bytes each, little-endian) and the salt (UTF-8), so that a hash stands for all tokens up to it.
    """
    parent, salted = bytes(32), salt.encode("utf-8", "surrogatepass")
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = struct.pack(f"<{page_size}q", *tokens[start : start + page_size])
        parent = sha256(parent + page + salted).digest()
        yield parent
