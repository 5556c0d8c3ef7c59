"""Which grants of blocks can never end in a deadlock: the banker's algorithm.

A state is safe when the admitted requests can be brought to their `max_new_tokens` in some order,
each with the blocks that are free and those that the ones before it gave back. Nothing is ever
preempted, so only safe states may be entered: from an unsafe one all rows may come to wait for each
other. Source: E. W. Dijkstra, "The mathematics behind the Banker's Algorithm", EWD 623.

Blocks that several requests hold count once, and come free with their last holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from flexijax.engine.boundary import Limits, RequestState


class BlockLedger:
    """Who holds how many blocks and may come to need how many more; grants what leaves it safe.

    admitted: the requests that hold blocks. waiting: those that `admit` may be called with.
    """

    def __init__(
        self, limits: Limits, admitted: Sequence[RequestState], waiting: Sequence[RequestState]
    ) -> None:
        self._limits = limits
        times: Counter[int] = Counter()
        for request in admitted:
            times.update(request.blocks)
        self.free = limits.blocks - len(times)
        for request in waiting:
            times.update(request.cached)
        # Blocks that have or may get several holders, who are kept by block; others are counted.
        shared = {block for request in waiting for block in request.cached}
        held = [*(of.blocks for of in admitted), *(of.cached for of in waiting)]
        # Where nobody shares, none of what may be a hundred thousand is looked at.
        if sum(map(len, held)) > len(times):
            shared.update(block for block, holders in times.items() if holders > 1)
        self._holders: dict[int, set[int]] = {block: set() for block in shared}
        self._alone: dict[int, int] = {}
        self._needs: dict[int, int] = {}
        for request in admitted:
            mine = shared.intersection(request.blocks)
            for block in mine:
                self._holders[block].add(request.key)
            self._alone[request.key] = len(request.blocks) - len(mine)
            self._needs[request.key] = self._final(request) - len(request.blocks)
        self._groups = self._group()

    def grow(self, key: int, count: int) -> bool:
        """Whether a request got so many more blocks. Not where that would be unsafe."""
        if not count:
            return True
        self._take(key, count)
        if self._is_safe():
            return True
        self._take(key, -count)
        return False

    def admit(self, request: RequestState) -> bool:
        """Whether a request got its prompt's blocks, sharing the cached ones."""
        key, cached = request.key, request.cached
        unheld = sum(not self._holders[block] for block in cached)
        count = self._limits.blocks_for(request.prompt_tokens) - len(cached)
        for block in cached:
            self._holders[block].add(key)
        before, self._groups = self._groups, self._group()
        self._alone[key] = 0
        self._needs[key] = self._final(request) - len(cached)
        self.free -= unheld
        self._take(key, count)
        if self._is_safe():
            return True
        self.free += unheld + count
        del self._alone[key], self._needs[key]
        for block in cached:
            self._holders[block].remove(key)
        self._groups = before
        return False

    def _take(self, key: int, count: int) -> None:
        self.free -= count
        self._alone[key] += count
        self._needs[key] -= count

    def _is_safe(self) -> bool:
        """Nobody's end takes blocks from others, so whoever needs least may as well end first."""
        free, groups = self.free, [[set(keys), blocks] for keys, blocks in self._groups.items()]
        if free < 0:
            return False
        for key in sorted(self._needs, key=self._needs.__getitem__):
            if self._needs[key] > free:
                return False
            free += self._alone[key]
            for keys, blocks in groups:
                if key in keys:
                    keys.remove(key)
                    free += 0 if keys else blocks
        return True

    def _group(self) -> Counter[frozenset[int]]:
        """How many blocks have the same several holders: there are few such groups."""
        return Counter(frozenset(keys) for keys in self._holders.values() if keys)

    def _final(self, request: RequestState) -> int:
        return self._limits.blocks_for(request.total_tokens)
