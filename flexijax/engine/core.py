"""What an engine does from one boundary to the next: admit, grow, decode, read prompts, let go."""

from __future__ import annotations

import collections
import dataclasses
import time

from flexijax.engine.answer import generation, token_of
from flexijax.engine.boundary import BoundaryPlan, Limits, Stage, apply
from flexijax.engine.compiling import compile_all
from flexijax.engine.entry import Entry
from flexijax.engine.inventory import all_calls
from flexijax.engine.measured import Answering, EngineTotals
from flexijax.engine.mesh import of_several_processes
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.planner import Planner
from flexijax.engine.processes import Processes, reading_budget
from flexijax.engine.program import Program, Progress
from flexijax.engine.prompting import Prompting
from flexijax.engine.sampling import Sampling
from flexijax.engine.shared_prefixes import SharedPrefixes
from flexijax.engine.stream import EngineError
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import placing, platform


class EngineCore:
    """Requests over one cache; for one thread, which calls `step` until nothing is left.

    prefill_first: whether prompts are read before anything decodes, so that rows decode together.
    prefix_caching: whether prompts that begin alike share the blocks of what they begin with, where
    the policy keeps all pages.
    """

    def __init__(
        self,
        lm: LanguageModel,
        program: Program,
        answering: Answering,
        *,
        progress: Progress | None,
        prefill_first: bool = False,
        prefix_caching: bool = True,
    ) -> None:
        sizes = program.layout.sizes
        self.lm, self._answering = lm, answering
        self.runner = ModelRunner(lm, program, progress=progress)
        self.limits = Limits(
            blocks=sizes.blocks,
            rows=sizes.batch,
            page_size=sizes.page_size,
            boundary_steps=program.steps,
        )
        self._prefixes = SharedPrefixes(program, enabled=prefix_caching)
        self.pool = self._prefixes.index
        self.entries: dict[int, Entry] = {}
        self._processes = Processes(self.limits) if of_several_processes(program) else None
        self._planner = Planner(self.limits, self._prefixes, self._processes)
        self._reading: Prompting | None = None
        self._in_flight: collections.deque[list[Entry]] = collections.deque()
        self._dispatch_ahead = platform.dispatches_ahead()
        self._prefill_first = prefill_first
        self.totals = EngineTotals()

    def compile(self, sampling: Sampling) -> int:
        """Compiles all that requests with such `sampling` can come to run; how many programs."""
        self.runner.serve(sampling)
        with placing.over(self.runner.program.mesh):
            calls = list(all_calls(self.runner.program, self.lm.params))
            return compile_all(self.runner.runner, calls)

    def add(self, entry: Entry) -> None:
        """A request that waits from now on; its key is new."""
        self.entries[entry.state.key] = entry
        self.totals.submitted += 1

    def cancel(self, key: int) -> None:
        """Lets a request go at the next boundary, if it is there."""
        if (entry := self.entries.get(key)) is not None:
            entry.state = dataclasses.replace(entry.state, cancelled=True)

    def step(self) -> bool:
        """From one boundary to the next; whether anything is left to do.

        A program that fails takes the arrays with it that it was given: all requests that had a row
        fail then, and the others go on in new arrays.
        """
        if not self.entries:
            return False
        try:
            with placing.over(self.runner.program.mesh):
                self._boundary()
        except Exception as error:
            self._fail(error)
        except BaseException as error:
            self._fail(RuntimeError(f"interrupted by {type(error).__name__}"))
            raise
        return bool(self.entries)

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return self.runner.runner.seconds

    def clock(self) -> float:
        """Seconds, without those that compiling took."""
        return time.perf_counter() - self.compile_s

    def _boundary(self) -> None:
        plan = self._planner.plan(self.entries, reading=self._reading is not None)
        if self._in_flight and not self._only_goes_on(plan):
            # What is to change depends on what was sampled.
            self._decode([])
            plan = self._planner.plan(self.entries, reading=False)
        held = dict(self.entries)
        states = [entry.state for entry in held.values()]
        for state in apply(plan, states, self.pool, self.limits):
            held.pop(state.key)
            self.entries[state.key].state = state
        for key, entry in held.items():
            del self.entries[key]
            if key in plan.refuse:
                entry.stream.fail(ValueError(plan.refuse[key]))
            else:
                self._leave(entry, plan.release[key].value)
        self._run(plan)
        if not self.entries:  # and what is in flight is for nobody
            self._in_flight.clear()
            self.runner.in_flight.clear()

    def _only_goes_on(self, plan: BoundaryPlan) -> bool:
        """Whether the rows in flight go on and nothing else happens, but that they get blocks."""
        changes = (plan.release, plan.refuse, plan.admit, plan.pause, plan.resume)
        same = set(plan.decode) == {entry.state.key for entry in self._in_flight[-1]}
        return same and not any(changes) and self.runner.in_flight[-1].goes_on(self.runner.program)

    def _run(self, plan: BoundaryPlan) -> None:
        """What was planned until the next boundary."""
        for admission in plan.admit:
            self._begin(self.entries[admission.key])
        grown = [self.entries[key].state for key in plan.grow]
        self.runner.grow({of.row: of.blocks for of in grown if of.row is not None})
        for key in plan.pause:
            self.entries[key].times.pauses += 1
            self.totals.paused += 1
        took = 0.0
        if not (self._prefill_first and self._reading is not None):
            took = self._decode([self.entries[key] for key in plan.decode])
        rows = self._num_admitted()
        took_reading = self._read(took, plan.prefill_share)
        self.totals.prefill_s += took_reading
        self.totals.row_s += rows * took_reading
        self.totals.stalled_s += took_reading if plan.decode else 0.0

    def _begin(self, entry: Entry) -> None:
        state = entry.state
        assert state.row is not None and self._reading is None
        entry.times.began = self.clock()
        self._reading = self.runner.begin(
            entry.request, state.row, state.blocks, entry.label, entry.prompt, start=state.tokens
        )
        self.totals.cached_tokens += state.tokens
        entry.times.cached_tokens = state.tokens
        entry.sequence = self._reading.sequence

    def _decode(self, entries: list[Entry]) -> float:
        """The coming steps of these rows, or none; the seconds that this took.

        Where nothing else wants the device, their tokens are fetched when the steps after them have
        been dispatched, so that the device does not wait for what Python does at a boundary.
        """
        if not entries and not self._in_flight:
            return 0.0
        started, rows, stay = self.clock(), self._num_admitted(), 0
        if entries:
            self.runner.dispatch({of.state.row for of in entries if of.state.row is not None})
            self._in_flight.append(entries)
            for entry in entries:
                self._count_tokens(entry)
            stay = int(self._dispatch_ahead and self._reading is None)
        while len(self._in_flight) > stay:
            self._collect()
        took = self.clock() - started
        self.totals.decode_s += took
        self.totals.row_s += rows * took
        return took

    def _collect(self) -> None:
        """Waits for the steps that were dispatched first, and takes their tokens."""
        self.runner.collect()
        for entry in self._in_flight.popleft():
            if entry.state.key in self.entries:
                self._take(entry)

    def _num_admitted(self) -> int:
        return sum(entry.state.admitted for entry in self.entries.values())

    def _count_tokens(self, entry: Entry) -> None:
        """What a request will hold at most when the steps in flight are done."""
        assert entry.sequence is not None
        coming = self.limits.boundary_steps * len(self._in_flight)
        tokens = min(entry.sequence.held + coming, entry.state.total_tokens)
        entry.state = dataclasses.replace(entry.state, tokens=tokens)

    def _read(self, decoded_s: float, share: float) -> float:
        """Reads on for its share of the time that began with the steps, or a while without any.

        Returns the seconds that it took.
        """
        started = self.clock()
        budget, processes, pieces = reading_budget(decoded_s, share), self._processes, 0
        while (reading := self._reading) is not None:
            pieces += 1
            if self.runner.advance(reading):
                self._reading = None
                entry = next(e for e in self.entries.values() if e.sequence is reading.sequence)
                entry.state = dataclasses.replace(entry.state, stage=Stage.RUNNING)
                self.totals.prompt_tokens += len(entry.request.tokens)
                self._prefixes.remember(entry)
                self._take(entry)
            took = self.clock() - started
            if took >= budget if processes is None else pieces >= processes.pieces:
                break
        if processes is not None:
            processes.decoded(decoded_s)
            processes.has_read(pieces, self.clock() - started)
        return self.clock() - started

    def _take(self, entry: Entry) -> None:
        """Shows the tokens that came, and lets go of the request if it has ended."""
        sequence, request, text = entry.sequence, entry.request, entry.text
        assert sequence is not None
        if sequence.error is not None:
            self._release(entry)
            entry.stream.fail(sequence.error)
            return
        if len(sequence.tokens) > entry.shown:
            self.totals.new_tokens += len(sequence.tokens) - entry.shown
            entry.times.tokens_came(self.clock())
        for at in range(entry.shown, len(sequence.tokens)):
            token = sequence.tokens[at]
            if token in request.stop_ids:
                break
            entry.stream.put(text.push(token), token_of(sequence, at))
            if text.stopped:
                del sequence.tokens[at + 1 :], sequence.logprobs[at + 1 :]
                del sequence.alternatives[at + 1 :]
                self.runner.stop(sequence)
                break
        entry.shown = len(sequence.tokens)
        self._count_tokens(entry)
        if not sequence.active:
            stopped = text.stopped or sequence.tokens[-1] in request.stop_ids
            self._release(entry, "stop" if stopped else "length")

    def _release(self, entry: Entry, reason: str | None = None) -> None:
        """Gives back what a request holds; with a reason its stream ends."""
        del self.entries[entry.state.key]
        self.pool.release(list(entry.state.blocks))
        self._leave(entry, reason)

    def _leave(self, entry: Entry, reason: str | None) -> None:
        """Ends the stream of a request whose blocks are given back, and frees its row."""
        self.totals.ended += 1
        if reason is not None:
            entry.stream.put(entry.text.finish())
            made = generation(self.runner, entry, self._answering, reason)
            self.totals.add_moves(made.metrics)
            entry.stream.end(made)
        if entry.sequence is None:
            return
        if self._reading is not None and self._reading.sequence is entry.sequence:
            if self._reading.reading is not None:
                self._reading.reading.close()
            self._reading = None
        self.runner.leave(entry.sequence)

    def _fail(self, error: Exception) -> None:
        """A program had been given the arrays and did not give them back: what ran is lost."""
        for key, entry in list(self.entries.items()):
            if not entry.state.admitted:
                continue
            del self.entries[key]
            self.pool.release(list(entry.state.blocks))
            self.totals.ended += 1
            failed = EngineError(f"the engine failed while this request ran: {error}")
            failed.__cause__ = error
            entry.stream.fail(failed)
        self._reading = None
        self._in_flight.clear()
        self.runner.reset()
        self.pool.forget_all()
