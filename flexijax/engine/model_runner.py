"""The rows of a batch in one cache: prompts read into them, decode steps run over all of them."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Collection

import jax
import numpy as np

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.cache import Cache, init
from flexijax.engine.batch import SampledTokens, empty_batch
from flexijax.engine.execute import (
    Place,
    compile_calls,
    run_admit,
    run_commit,
    run_decode,
    run_load_prefix,
    run_refit,
)
from flexijax.engine.first_token import FirstToken, first_token
from flexijax.engine.in_flight import InFlight, banks_of, rows_of, take_part
from flexijax.engine.inventory import decode_calls
from flexijax.engine.prefiller import Prefiller, PrefillResult
from flexijax.engine.program import Program, Progress, Runner
from flexijax.engine.prompting import Prompting
from flexijax.engine.sampling import MAX_ALTERNATIVES, METHODS, Sampling, SamplingRows, method_of
from flexijax.engine.sequence import Request, Sequence, add_sampled, enter
from flexijax.engine.stats import SequenceStats, sequence_stats
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform


class ModelRunner:
    """Runs requests in a cache of `program.layout.sizes.batch` rows.

    It decides nothing: a caller says which request goes into which row and blocks, and when a piece
    of a prompt is read and when a few decode steps are run. `admit` and `release` do so for callers
    who have no plan of their own: each request gets a free row and all blocks it may come to need.
    Only between these calls does Python look at anything. in_flight: steps that are dispatched.
    """

    def __init__(self, lm: LanguageModel, program: Program, *, progress: Progress | None) -> None:
        self.lm, self.program = lm, program
        self.runner = Runner(progress, program.mesh)
        sizes = program.layout.sizes
        # Made when the first request comes, since compiling takes memory that it then can have: for
        # SmolLM2 as much as the cache of 8 thousand tokens, and half of that is free again.
        self.cache: Cache | None = None
        self._prefiller = Prefiller(program.decoder, lm.params, program.prefill_spec(), self.runner)
        self._allocator = BlockAllocator(sizes.blocks)
        self.running: dict[int, Sequence] = {}
        self._batch = jax.tree.map(np.array, empty_batch(sizes.batch))
        self._tables = np.zeros((sizes.batch, sizes.pages), np.int32)
        self.in_flight: collections.deque[InFlight] = collections.deque()
        self._collected = 0.0

    def blocks_of(self, request: Request) -> int:
        """Blocks that a request may come to need."""
        tokens = len(request.tokens) + request.max_new_tokens
        return -(-tokens // self.program.layout.sizes.page_size)

    def can_admit(self, request: Request) -> bool:
        """Whether a row and enough blocks are free."""
        free = len(self.running) < self.program.layout.sizes.batch
        return free and self._allocator.can_allocate(self.blocks_of(request))

    def admit(self, request: Request, label: str, prompt: PrefillResult | None = None) -> Sequence:
        """Reads the prompt into a free row and samples the first token.

        label: what progress calls it. prompt: where it has been read already, which it survives.
        The caller has asked `can_admit`.
        """
        row = min(set(range(self.program.layout.sizes.batch)) - self.running.keys())
        blocks = self._allocator.allocate(self.blocks_of(request))
        prompting = self.begin(request, row, blocks, label, prompt)
        while not self.advance(prompting):
            pass
        return prompting.sequence

    def release(self, sequence: Sequence) -> None:
        """Frees the row and the blocks of a request that `admit` took in and that has ended."""
        self.leave(sequence)
        self._allocator.release(list(sequence.blocks))

    def begin(
        self,
        request: Request,
        row: int,
        blocks: Collection[int],
        label: str,
        prompt: PrefillResult | None = None,
        start: int = 0,
    ) -> Prompting:
        """A request takes a row that is free; `advance` reads its prompt.

        blocks: one block id for each of the prompt's pages, and more, if any; they hold its first
        `start` tokens already, whole chunks.
        """
        self.serve(request.sampling)
        started = self._clock()
        if self.cache is None:
            if request.max_new_tokens > 1:
                few = self.program.row_counts[0]
                compile_calls(self.runner, decode_calls(self.program, self.lm.params, few))
            self.cache = init(self.program.layout, self.program.policy)
        place = Place.of(self.program, row, blocks, len(request.tokens), start)
        sequence = Sequence(request=request, row=row, blocks=tuple(blocks))
        self.running[row] = sequence
        reading = None
        if prompt is None:
            reading = self._prefiller.begin(request.tokens, label, start)
        made = Prompting(request, place, sequence, reading, None if prompt is None else prompt.x)
        if prompt is not None:
            self.cache = prompt.commit(
                self.runner, self.program, self.cache, row=row, blocks=blocks
            )
        made.seconds += self._clock() - started
        return made

    def advance(self, prompting: Prompting) -> bool:
        """Reads a piece of the prompt, with the last one samples the first token; whether done."""
        started = self._clock()
        reading = prompting.reading
        assert self.cache is not None
        if reading is not None and not reading.done:
            if reading.wants_prefix:
                reading.kv = run_load_prefix(
                    self.runner,
                    self.program,
                    self.cache,
                    reading.layer,
                    reading.kv,
                    prompting.place,
                )
            layer = reading.advance()
            if layer is not None:
                spec, place = self._prefiller.spec, prompting.place
                self.cache = run_commit(
                    self.runner, self.program, spec, self.cache, layer, reading.kv, place
                )
            # So that whoever shares out time knows what a piece takes.
            jax.block_until_ready(reading.kv.k)
        done = reading is None or reading.done
        if done:
            if reading is not None:
                prompting.x = reading.x
                self.cache = run_admit(self.cache, prompting.place)
            self._start(prompting)
        prompting.seconds += self._clock() - started
        if done:
            prompting.sequence.prefill_s = prompting.seconds
        return done

    def _start(self, prompting: Prompting) -> None:
        """Samples the first token and enters the request into the batch of the next steps."""
        request, sequence = prompting.request, prompting.sequence
        seeds, row = np.array([request.seed], np.uint32), sequence.row
        mine, seeds = platform.put((SamplingRows.of([request.sampling]), seeds))
        args = (self.lm.params, prompting.x, mine, seeds)
        program = self.program
        first = FirstToken(program.decoder, program.sampling, program.alternatives)
        sampled = self.runner.run("first token", first_token, first, args)
        add_sampled(sequence, jax.device_get(sampled), 0)
        [token] = sequence.tokens
        ends = request.max_new_tokens == 1 or token in request.stop_ids
        sequence.active = not ends and sequence.error is None
        self._tables[row] = 0
        self._tables[row, : len(sequence.blocks)] = sequence.blocks
        enter(self._batch, row, request, mine, token, sequence.active)

    def serve(self, sampling: Sampling) -> None:
        """Makes the decode program one that can sample so, from now on."""
        method = max(method_of(sampling), self.program.sampling, key=METHODS.index)
        most = MAX_ALTERNATIVES if sampling.alternatives else self.program.alternatives
        if (method, most) != (self.program.sampling, self.program.alternatives):
            self.program = dataclasses.replace(self.program, sampling=method, alternatives=most)

    def grow(self, blocks: dict[int, Collection[int]]) -> None:
        """New lists of blocks for some rows, which go on as the old ones did."""
        if not blocks:
            return
        assert self.cache is not None
        size = self.program.layout.sizes.bank_rows
        for row, mine in blocks.items():
            self.running[row].blocks = tuple(mine)
            self._tables[row, : len(mine)] = list(mine)
        # From the host's own tables: to ask for the device's would wait for what runs there.
        for bank in {row // size for row in blocks}:
            table = platform.put(self._tables[bank * size : (bank + 1) * size].copy())
            standing = self.cache.banks[bank].standing._replace(block_table=table)
            self.cache = self.cache.with_standing(bank, standing)

    def step(self, rows: Collection[int] | None = None) -> list[Sequence]:
        """`dispatch` and `collect`."""
        self.dispatch(rows)
        return self.collect()

    def dispatch(self, rows: Collection[int] | None = None) -> None:
        """Starts `program.steps` decode steps, whose tokens `collect` waits for.

        rows: that take part, None for all. Every R of its own steps a request's chunk ends,
        whatever runs beside it. Where steps are in flight, the same rows go on from where those
        leave them; see `InFlight.goes_on`.
        """
        started, before = self._clock(), self.in_flight[-1] if self.in_flight else None
        assert self.cache is not None, "nothing has been admitted"
        took_part, due = take_part(self.program, self.running.values(), rows)
        banks = banks_of(self.program, {of.row for of in took_part})
        numbers, ends = rows_of(self.program, banks), np.zeros_like(self._batch.active)
        self._batch.active[:] = False
        self._batch.active[[of.row for of in took_part]] = True
        ends[[of.row for of in due]] = True
        if before is None:
            batch = platform.put(jax.tree.map(lambda leaf: leaf[numbers], self._batch))
        else:
            batch = before.batch
        self.cache, batch, sampled = run_decode(
            self.runner,
            self.program.of_rows(len(numbers)),
            self.lm.params,
            self.cache,
            banks,
            batch,
            ends[numbers],
        )
        self.in_flight.append(
            InFlight(tuple(took_part), numbers, ends[numbers], batch, sampled, started)
        )

    def collect(self) -> list[Sequence]:
        """Waits for the steps dispatched first; the requests that generated tokens in them."""
        assert self.cache is not None
        steps = self.in_flight.popleft()
        batch, sampled = jax.device_get((steps.batch, steps.sampled))
        for leaf, made in zip(*map(jax.tree.leaves, (self._batch, batch)), strict=True):
            leaf[steps.rows] = made
        now = self._clock()
        took, self._collected = now - max(steps.started, self._collected), now
        generated = []
        for sequence in steps.sequences:
            if self.running.get(sequence.row) is not sequence:
                self._batch.active[sequence.row] = False  # it has been left meanwhile
            elif self._take(sequence, sampled, steps.place(sequence), took):
                generated.append(sequence)
                if steps.due[steps.place(sequence)] and sequence.active:
                    # Fits the scores' states anew, where the prompt was too short to.
                    self.cache = run_refit(
                        self.runner,
                        self.program,
                        self.cache,
                        row=sequence.row,
                        prompt=len(sequence.request.tokens),
                        before=sequence.held - self.program.chunk_steps,
                    )
        return generated

    def _clock(self) -> float:
        """Seconds, without those that compiling took."""
        return time.perf_counter() - self.runner.seconds

    def _take(self, sequence: Sequence, sampled: SampledTokens, at: int, took: float) -> bool:
        """What was sampled at place `at` of the rows that ran."""
        emitted = add_sampled(sequence, sampled, at)
        sequence.active = bool(self._batch.active[sequence.row]) and sequence.error is None
        # A request that ends inside of the steps took its share of them.
        sequence.decode_s += took * float(emitted.sum()) / emitted.size
        return bool(emitted.any())

    def stop(self, sequence: Sequence) -> None:
        """Ends a request early, as a stop string does; its row is to be left next."""
        sequence.active = False
        self._batch.active[sequence.row] = False

    def leave(self, sequence: Sequence) -> None:
        """Frees the row of a request that has ended, or whose prompt is not read to its end."""
        self.stop(sequence)
        del self.running[sequence.row]

    def reset(self) -> None:
        """Lets go of all arrays and requests, after a program failed that had been given them."""
        self.cache = None
        self.running.clear()
        self.in_flight.clear()
        self._batch.active[:] = False
        self._prefiller.reset()

    def stats(self, sequence: Sequence) -> SequenceStats:
        """What the programs have counted of a request."""
        assert self.cache is not None
        return sequence_stats(self.program.layout, self.cache, row=sequence.row)
