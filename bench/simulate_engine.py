"""The engine itself, on a clock of its own: what runs on the device only takes predicted seconds.

`SimulatedCore` is the engine's `EngineCore`: it plans, admits, grows, pauses, reads and lets go by
the engine's own code. What is exchanged is the `ModelRunner` below it, which puts off what a GPU
would do, and the clock.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable
from typing import Any, cast

import numpy as np

from bench.simulate_times import Times
from flexijax.cache.prefill_kv import pieces
from flexijax.config import CacheConfig
from flexijax.engine.boundary import BoundaryPlan
from flexijax.engine.core import EngineCore
from flexijax.engine.entry import Entry, new_entry
from flexijax.engine.in_flight import InFlight, banks_of, rows_of, take_part
from flexijax.engine.measured import Answering
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.program import Program
from flexijax.engine.prompting import Prompting
from flexijax.engine.sampling import Sampling
from flexijax.engine.sequence import Request, Sequence
from flexijax.engine.stats import SequenceStats
from flexijax.engine.stream import Stream
from flexijax.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that arrives so many seconds after the start; it generates all its new tokens."""

    arrival: float
    prompt_tokens: int
    new_tokens: int


class Reading:
    """A prompt that is being read: seconds of each piece, in the order of `prefiller.Reading`."""

    def __init__(self, program: Program, times: Times, tokens: int) -> None:
        layer = [times.piece(piece) for piece in pieces(program.prefill_spec(), tokens)]
        layer[-1] += times.commit.seconds(1, tokens)
        self._layer, self._left = layer, len(layer) * program.layout.sizes.shape.num_layers

    def advance(self) -> float:
        """Reads the next piece; its seconds."""
        seconds = self._layer[-self._left % len(self._layer)]
        self._left -= 1
        return seconds

    @property
    def done(self) -> bool:
        """Whether all layers have been read."""
        return not self._left

    def close(self) -> None:
        """Nothing: a reading has no arrays."""


class SimulatedRunner(ModelRunner):
    """Runs nothing. now: seconds since the start, of the host; busy_until: of the device."""

    def __init__(self, lm: LanguageModel, program: Program, times: Times, boundary: float) -> None:
        """boundary: seconds of Python before steps are dispatched."""
        super().__init__(lm, program, progress=None)
        self._times, self._boundary = times, boundary
        self.now = self.busy_until = self.step_s = self.read_s = 0.0
        self._ends: collections.deque[float] = collections.deque()

    def begin(
        self,
        request: Request,
        row: int,
        blocks: Collection[int],
        label: str,
        prompt: Any = None,
        start: int = 0,
    ) -> Prompting:
        """See `ModelRunner`."""
        sequence = Sequence(request=request, row=row, blocks=tuple(blocks))
        self.running[row] = sequence
        reading = Reading(self.program, self._times, len(request.tokens) - start)
        return Prompting(request, cast(Any, None), sequence, cast(Any, reading))

    def advance(self, prompting: Prompting) -> bool:
        """Reads a piece, and waits for it; with the last one comes the first token."""
        reading, sequence = cast(Any, prompting.reading), prompting.sequence
        seconds = reading.advance()
        self.busy_until = self.now = max(self.now, self.busy_until) + seconds
        prompting.seconds += seconds
        self.read_s += seconds
        if reading.done:
            sequence.prefill_s = prompting.seconds
            self._add(sequence, 1)
        return reading.done

    def grow(self, blocks: dict[int, Collection[int]]) -> None:
        """New lists of blocks for some rows."""
        for row, mine in blocks.items():
            self.running[row].blocks = tuple(mine)

    def dispatch(self, rows: Collection[int] | None = None) -> None:
        """The coming steps, behind what the device is at already."""
        took_part, due = take_part(self.program, self.running.values(), rows)
        self.now += self._boundary
        steps, pending = self.program.steps, collections.Counter[int]()
        for flight in self.in_flight:
            pending.update(of.row for of in flight.sequences)
        held = {of.row: of.held + steps * (pending[of.row] + 1) for of in took_part}
        step = self._times.step.seconds(len(took_part), sum(held.values()))
        rerank = self._times.rerank.seconds(len(due), sum(held[of.row] for of in due))
        self.busy_until = max(self.now, self.busy_until) + steps * step + rerank
        self.step_s += steps * step + rerank
        self._ends.append(self.busy_until)
        numbers = rows_of(self.program, banks_of(self.program, set(held)))
        ends = np.isin(numbers, [of.row for of in due])
        nothing = cast(Any, None)
        self.in_flight.append(InFlight(tuple(took_part), numbers, ends, nothing, nothing, self.now))

    def collect(self) -> list[Sequence]:
        """Waits for the steps dispatched first."""
        flight = self.in_flight.popleft()
        self.now = max(self.now, self._ends.popleft())
        found = []
        for sequence in flight.sequences:
            if self.running.get(sequence.row) is sequence and sequence.active:
                left = sequence.request.max_new_tokens - len(sequence.tokens)
                self._add(sequence, min(left, self.program.steps))
                found.append(sequence)
        return found

    def reset(self) -> None:
        """A program never fails here: what does is the simulation."""
        raise RuntimeError("the simulated engine failed")

    def stats(self, sequence: Sequence) -> SequenceStats:
        """Nothing is counted in arrays that are not there."""
        return SequenceStats(len(sequence.tokens) // self.program.chunk_steps, 0, 0, 0, ())

    def _add(self, sequence: Sequence, tokens: int) -> None:
        sequence.tokens += [0] * tokens
        sequence.logprobs += [0.0] * tokens
        sequence.active = len(sequence.tokens) < sequence.request.max_new_tokens


class SimulatedCore(EngineCore):
    """The engine of `program` with predicted `times`. lm: its weights may be shapes.

    boundary: seconds of Python at each. prefill_first: see `EngineCore`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        program: Program,
        cache: CacheConfig,
        times: Times,
        *,
        boundary: float,
        prefill_first: bool,
    ) -> None:
        super().__init__(
            lm,
            program,
            Answering(cache),
            progress=None,
            prefill_first=prefill_first,
            prefix_caching=False,
        )
        self.simulated = SimulatedRunner(lm, program, times, boundary)
        self.runner = self.simulated
        self.peak_blocks = 0

    def clock(self) -> float:
        """Simulated seconds."""
        return self.simulated.now

    def _run(self, plan: BoundaryPlan) -> None:
        """When all that was planned has been granted, and nothing of it given back."""
        self.peak_blocks = max(self.peak_blocks, self.limits.blocks - self.pool.num_free)
        super()._run(plan)

    def run(self, asked: Iterable[Asked]) -> dict[str, Any]:
        """All requests to their end; what was found, as plain JSON values.

        seconds: until the last one ended. tokens_per_s: of prompts and answers; tpot_ms, ttft_s:
        means over requests, of the time between tokens, whatever else ran in it, and of that from
        arrival to the first. running: requests that held a row, on average. peak_blocks: held at a
        time. Raises RuntimeError where the engine refuses or loses one.
        """
        coming = collections.deque(sorted(asked, key=lambda one: one.arrival))
        entries: list[Entry] = []
        while coming or self.entries:
            if not self.entries:
                self.simulated.now = max(self.simulated.now, coming[0].arrival)
            while coming and coming[0].arrival <= self.clock():
                entries.append(self._enter(coming.popleft(), len(entries)))
            self.step()
        for entry in entries:
            sequence, problem = entry.sequence, entry.stream.error
            if problem is not None:
                raise RuntimeError(f"request {entry.state.key} failed") from problem
            if sequence is None or len(sequence.tokens) != entry.request.max_new_tokens:
                raise RuntimeError(f"request {entry.state.key} did not end")
        seconds, totals = self.clock(), self.totals
        return {
            "requests": len(entries),
            "rows": self.limits.rows,
            "blocks": self.limits.blocks,
            "peak_blocks": self.peak_blocks,
            "running": totals.row_s / max(seconds, 1e-9),
            "seconds": seconds,
            "reading_s": self.simulated.read_s,
            "decoding_s": self.simulated.step_s,
            "tokens_per_s": (totals.prompt_tokens + totals.new_tokens) / seconds,
            "new_tokens_per_s": totals.new_tokens / seconds,
            "tpot_ms": float(np.mean([_between_tokens(entry) for entry in entries])),
            "ttft_s": float(np.mean([entry.times.ttft_s for entry in entries])),
            "pauses": totals.paused,
        }

    def _enter(self, one: Asked, key: int) -> Entry:
        request = Request(
            index=key,
            tokens=cast(Any, range(one.prompt_tokens)),
            max_new_tokens=one.new_tokens,
            sampling=Sampling(),
            seed=0,
            stop_ids=(),
        )
        stream = Stream(lambda waits: None, lambda: None)
        entry = new_entry(self.lm, self.limits, request, stream, key=key, label="", now=one.arrival)
        self.add(entry)
        return entry


def _between_tokens(entry: Entry) -> float:
    """Milliseconds from one token of a request to the next, from its first to its last."""
    times, more = entry.times, entry.request.max_new_tokens - 1
    return 0.0 if times.first is None or not more else 1e3 * (times.last - times.first) / more
