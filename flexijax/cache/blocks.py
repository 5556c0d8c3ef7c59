"""Which blocks are free: a free list with reference counts, in plain Python.

A block is the same `page_size` tokens of one request in every layer, head and tier, so one integer
stands for all of them and admission is one division.
"""


class BlockAllocator:
    """Hands out block ids 0 .. num_blocks - 1; a block shared by requests is counted, not copied.

    Raises ValueError when num_blocks is not positive.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether `allocate(count)` would succeed."""
        return 0 <= count <= len(self._free)

    def references(self, block: int) -> int:
        """How many hold the block; 0 for a free one."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Block ids for `count` pages, each with one reference.

        Raises ValueError when fewer are free; nothing is taken then.
        """
        if not self.can_allocate(count):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} of them free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """Adds a reference to blocks in use, for a request that starts with the same tokens.

        Raises ValueError when one of them is free; no reference is added then.
        """
        self._require_in_use(blocks)
        for block in blocks:
            self._references[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Gives one reference of each block back; a block without any is free again.

        Raises ValueError when a block has no reference to give back; none is given back then.
        """
        self._require_in_use(blocks)
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def _require_in_use(self, blocks: list[int]) -> None:
        asked: dict[int, int] = {}
        for block in blocks:
            asked[block] = asked.get(block, 0) + 1
        for block, times in asked.items():
            if not 0 <= block < self.num_blocks or self._references[block] < times:
                raise ValueError(f"block {block} is not in use {times} times")
