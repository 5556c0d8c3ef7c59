"""Decode steps that have been dispatched, and whose tokens nobody has fetched yet."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable

import numpy as np

from flexijax.cache.refit import is_due
from flexijax.engine.batch import BatchState, SampledTokens
from flexijax.engine.program import Program
from flexijax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class InFlight:
    """The steps from one boundary to the next, on their way on the device.

    sequences: that take part. rows: int[b] of the program, those that take no part among them.
    due: of those, bool[b], whose chunk ends with these steps. batch: where they stand after them.
    started: seconds of the runner's clock.
    """

    sequences: tuple[Sequence, ...]
    rows: np.ndarray
    due: np.ndarray
    batch: BatchState
    sampled: SampledTokens
    started: float

    def place(self, sequence: Sequence) -> int:
        """The place of a sequence that takes part among the rows."""
        return int(np.searchsorted(self.rows, sequence.row))

    def goes_on(self, program: Program) -> bool:
        """Whether the next steps of the same rows need not wait for what these sample.

        They must where a request reaches its last token, since they would be for nothing, and where
        a score's state is fitted anew between the two.
        """
        for sequence in self.sequences:
            request = sequence.request
            if len(sequence.tokens) + program.steps >= request.max_new_tokens:
                return False
            before = sequence.held + program.steps - program.chunk_steps
            prompt = len(request.tokens)
            ends = self.due[self.place(sequence)]
            rule, steps = program.refit_rule, program.chunk_steps
            if ends and is_due(rule, steps, prompt=prompt, before=before):
                return False
        return True


def take_part(
    program: Program, running: Iterable[Sequence], rows: Collection[int] | None
) -> tuple[list[Sequence], list[Sequence]]:
    """The requests of these rows that go on, and those of them whose chunk ends with that.

    rows: None for all. Counts the coming steps of each.
    """
    found = [of for of in running if of.active and (rows is None or of.row in rows)]
    for sequence in found:
        sequence.chunk_steps = (sequence.chunk_steps + program.steps) % program.chunk_steps
    return found, [of for of in found if not of.chunk_steps]


def banks_of(program: Program, rows: set[int]) -> list[int]:
    """The banks of these rows, and as many more as the smallest program that will do takes."""
    sizes = program.layout.sizes
    needed = sorted({row // sizes.bank_rows for row in rows})
    others = (bank for bank in range(sizes.banks) if bank not in needed)
    counts = (rows // sizes.bank_rows for rows in program.row_counts)
    count = next(count for count in counts if count >= len(needed))
    return sorted([*needed, *itertools.islice(others, count - len(needed))])


def rows_of(program: Program, banks: list[int]) -> np.ndarray:
    """int[b]: the rows of some banks, in order."""
    size = program.layout.sizes.bank_rows
    return np.concatenate([np.arange(bank * size, (bank + 1) * size) for bank in banks])
