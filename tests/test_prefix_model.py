"""Prefix reuse against a plain model: a dict from all tokens up to a page's end to its block."""

import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.prefix import PrefixIndex

pytestmark = pytest.mark.any_jax

PAGE, BLOCKS = 2, 6
TOKENS = st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=7)
SALTS = st.sampled_from(["", "a"])


@dataclasses.dataclass
class Known:
    """One block of the model. used: when the last request let go of it."""

    block: int
    used: int = 0


class Model:
    """What `PrefixIndex` promises, by searching everything.

    known: by (salt, tokens up to the end of the page). held: block -> requests that hold it.
    """

    def __init__(self):
        self.known: dict[tuple[str, tuple[int, ...]], Known] = {}
        self.held = dict.fromkeys(range(BLOCKS), 0)
        self.clock = 0

    @property
    def free(self):
        return [block for block, times in self.held.items() if not times]

    def match(self, tokens, salt, grid, fewest):
        """The longest length on the grid whose every page is known, tried from the longest."""
        for length in range(len(tokens) - 1, 0, -1):
            ends = range(PAGE, length + 1, PAGE)
            paths = [(salt, tuple(tokens[:end])) for end in ends]
            if length % grid == 0 and length >= fewest and all(p in self.known for p in paths):
                return [self.known[path].block for path in paths]
        return []

    def insert(self, tokens, blocks, salt):
        for at in range(len(tokens) // PAGE):
            path = (salt, tuple(tokens[: (at + 1) * PAGE]))
            self.known.setdefault(path, Known(blocks[at]))

    def release(self, blocks):
        self.clock += 1
        for block in blocks:
            self.held[block] -= 1
        for known in self.known.values():
            if known.block in blocks and not self.held[known.block]:
                known.used = self.clock

    def below(self, path):
        """Known pages that continue it, itself first."""
        salt, tokens = path
        return [p for p in self.known if p[0] == salt and p[1][: len(tokens)] == tokens]

    def allocate(self, count):
        """Forgets what has to go; which of the free blocks are taken, the index may choose."""

        def age(path):
            return self.known[path].used, self.known[path].block

        while len([b for b in self.free if b not in self.blocks()]) < count:
            idle = [path for path in self.known if not self.held[self.known[path].block]]
            ends = [path for path in idle if len(self.below(path)) == 1]
            chosen = min(ends or idle, key=age)
            while more := [p for p in self.below(chosen) if p in idle and is_page_after(p, chosen)]:
                chosen = min(more, key=age)
            for path in self.below(chosen):
                del self.known[path]

    def blocks(self):
        return {known.block for known in self.known.values()}


def is_page_after(path, before):
    return len(path[1]) == len(before[1]) + PAGE


@dataclasses.dataclass
class Reading:
    """A request of the test."""

    tokens: list[int]
    salt: str
    blocks: list[int]


class PrefixMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.model = Model()
        self.requests: list[Reading] = []
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # what was written, by block

    @initialize(pages=st.integers(1, 2), fewest=st.integers(0, 5))
    def start(self, pages, fewest):
        self.grid, self.fewest = pages * PAGE, fewest
        self.index = PrefixIndex(
            BlockAllocator(BLOCKS), page_size=PAGE, grid=self.grid, fewest=fewest
        )

    @rule(tokens=TOKENS, salt=SALTS)
    def admit(self, tokens, salt):
        """What the engine does with a prompt, where the blocks are there."""
        model, index = self.model, self.index
        found = index.match(tokens, salt)
        assert found == model.match(tokens, salt, self.grid, self.fewest)
        for at, block in enumerate(found):  # never another prompt's, never a stale one
            assert self.content[block] == (salt, tuple(tokens[: (at + 1) * PAGE]))
        wanted = -(-len(tokens) // PAGE) - len(found)
        room = len(set(model.free) - set(found))
        index.acquire(found, len(tokens))
        for block in found:
            model.held[block] += 1
        assert index.can_allocate(wanted) == (wanted <= room)
        if wanted > room:
            with pytest.raises(ValueError, match="of them free"):
                index.allocate(wanted)
            index.release(found)
            model.release(found)
            return
        model.allocate(wanted)
        taken = index.allocate(wanted)
        assert len(set(taken)) == wanted and set(taken) <= set(model.free) - model.blocks()
        for block in taken:
            model.held[block] += 1
        blocks = found + taken
        for at, block in enumerate(blocks):
            self.content[block] = (salt, tuple(tokens[: (at + 1) * PAGE]))
        self.requests.append(Reading(tokens, salt, blocks))

    @rule(tokens=TOKENS, salt=SALTS, pages=st.integers(1, 2))
    def two_read_the_same_at_once(self, tokens, salt, pages):
        """Neither finds the other's blocks, and the longer chain goes on below the first's."""
        before = len(self.requests)
        self.admit(tokens[: pages * PAGE], salt)
        self.admit(tokens, salt)
        if len(self.requests) == before + 2:
            self.insert(self.requests[-2])
            self.insert(self.requests[-1])
            self.end(-2)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def has_been_read(self, data):
        """Some are cancelled before, so it need not come; twice is as once."""
        self.insert(data.draw(st.sampled_from(self.requests)))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def ends(self, data):
        self.end(data.draw(st.integers(0, len(self.requests) - 1)))

    def insert(self, one):
        self.index.insert(one.tokens, one.blocks, one.salt)
        self.model.insert(one.tokens, one.blocks, one.salt)

    def end(self, at):
        one = self.requests.pop(at)
        self.index.release(one.blocks)
        self.model.release(one.blocks)

    @invariant()
    def every_block_is_held_or_free(self):
        if hasattr(self, "index"):
            assert self.index.num_free == len(self.model.free)
            assert self.index.num_cached == len(self.model.known)

    def teardown(self):
        for one in self.requests:
            self.index.release(one.blocks)
        if hasattr(self, "index"):
            assert self.index.num_free == BLOCKS
            assert sorted(self.index.allocate(BLOCKS)) == list(range(BLOCKS))
            assert self.index.num_cached == 0


TestPrefixMachine = PrefixMachine.TestCase
TestPrefixMachine.settings = hypothesis.settings(
    deadline=None, max_examples=80, stateful_step_count=40
)
