"""Which prompts begin alike, and which blocks they share therefore."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.cache import keeps_all_by_block
from flexijax.cache.prefix import PrefixIndex
from flexijax.engine.boundary import Limits, Stage
from flexijax.engine.entry import Entry
from flexijax.engine.program import Program


class SharedPrefixes:
    """The blocks of an engine, and which of them later prompts may begin with.

    index: hands out all blocks, whether or not any are shared. None are where they are not
    `enabled`, where a policy does not keep every page by its block, and where it observes more of a
    prompt than its last query, which is not kept of what is shared.
    """

    def __init__(self, program: Program, *, enabled: bool) -> None:
        sizes, policy = program.layout.sizes, program.policy
        self.index = PrefixIndex(
            BlockAllocator(sizes.blocks),
            page_size=sizes.page_size,
            # So that what follows a hit is read in the chunks in which a miss reads it.
            grid=math.lcm(program.prefill_spec().chunk, sizes.page_size),
            fewest=program.code_tokens,
        )
        observes = policy.prompt_window is None or policy.prompt_window > 1
        self._enabled = enabled and not observes and keeps_all_by_block(program.layout)

    def look_up(self, entries: Iterable[Entry], limits: Limits) -> None:
        """Notes what the cache knows of the next prompts, where one of them may be admitted now."""
        if not self._enabled:
            return
        entries = list(entries)
        rows = sum(entry.state.admitted for entry in entries)
        waiting = [entry for entry in entries if entry.state.stage is Stage.WAITING]
        for entry in waiting[: limits.max_passes + 1]:
            known = []
            if rows < limits.rows and entry.prompt is None:
                tokens, hashes = entry.request.tokens, entry.hashes(limits.page_size)
                known = self.index.match(tokens, entry.salt, hashes=hashes)
            entry.state = dataclasses.replace(entry.state, cached=tuple(known))

    def remember(self, entry: Entry) -> None:
        """Makes a prompt known that has been read, as far as it was read in whole chunks.

        The products of a tail have another shape and round otherwise; a later prompt that goes on
        differently would be read in a chunk there.
        """
        if not self._enabled or entry.prompt is not None:
            return
        tokens = entry.request.tokens
        whole = len(tokens) // self.index.grid * self.index.grid
        self.index.insert(tokens[:whole], entry.state.blocks, entry.salt)
