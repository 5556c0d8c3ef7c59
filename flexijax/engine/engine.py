"""The engine: admits requests into rows of a cache and runs decode chunks over all of them."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.cache import Cache
from flexijax.engine.decode import Drawn, Rows
from flexijax.engine.prefill import Program
from flexijax.engine.prefiller import Progress, Reader
from flexijax.engine.program import Compiler, compile_decode, run_decode
from flexijax.engine.sampling import Sampling, SamplingRows, sample, step_keys
from flexijax.models.language_model import LanguageModel

# Stop tokens a request may name; a fixed width, so that programs are compiled once.
MAX_STOP_IDS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, checked and tokenized. index: its place in the caller's list."""

    index: int
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]


class CountedHead(NamedTuple):
    """One slotted head of a request; fields as in `cache.HeadCounters`."""

    layer: int
    head: int
    reranks: int
    overlap: float
    rco: float
    choices: int


class Counted(NamedTuple):
    """What was counted of a request; fields as in `cache.Counters`."""

    reranks: int
    promoted: int
    offloaded: int
    heads: tuple[CountedHead, ...]


@dataclasses.dataclass
class Running:
    """A request in a row of the cache, and what it has drawn so far (stop token included)."""

    request: Request
    row: int
    blocks: list[int]
    tokens: list[int]
    logprobs: list[float]
    prefill_s: float
    decode_s: float = 0.0
    active: bool = True


class Engine:
    """Runs requests through one cache of `program.layout.rows` rows.

    `admit` reads a prompt into a free row and draws its first token; `step` runs one decode chunk
    over all rows; `release` frees a row. Only between these calls does Python look at anything.
    """

    def __init__(self, lm: LanguageModel, program: Program, *, progress: Progress | None) -> None:
        self.lm, self.program = lm, program
        self.compiler = Compiler(program, progress)
        layout = program.layout
        # Made when the first prompt has been read, so that it need not stand beside the reading.
        self.cache: Cache | None = None
        self._reader = Reader(lm.params, self.compiler, progress)
        self._allocator = BlockAllocator(layout.blocks)
        self.running: dict[int, Running] = {}
        self._rows = jax.tree.map(np.array, free_rows(layout.rows))

    def blocks_of(self, request: Request) -> int:
        """Blocks that a request may come to need."""
        return -(-(len(request.tokens) + request.max_new_tokens) // self.program.layout.page_size)

    def can_admit(self, request: Request) -> bool:
        """Whether a row and enough blocks are free."""
        free = len(self.running) < self.program.layout.rows
        return free and self._allocator.can_allocate(self.blocks_of(request))

    def admit(self, request: Request, label: str) -> Running:
        """Reads the prompt, draws the first token and puts the request into a free row.

        label: what progress calls it. The caller has asked `can_admit`.
        """
        layout = self.program.layout
        row = next(r for r in range(layout.rows) if r not in self.running)
        blocks = self._allocator.allocate(self.blocks_of(request))
        admitted, compiled = time.perf_counter(), self.compiler.seconds
        if self.cache is None and request.max_new_tokens > 1:
            compile_decode(self.compiler, self.lm.params, self._device_rows())
        reading = self._reader.read(request.tokens, label)
        self.cache = reading.commit(self.compiler, self.cache, row=row, blocks=blocks, release=True)
        drawn = self.compiler.run(
            _first_token,
            "first token",
            (),
            self.lm.params,
            reading.x,
            SamplingRows.of([request.sampling]),
            jnp.asarray([request.seed], jnp.uint32),
        )
        token, logprob = (float(value[0]) for value in jax.device_get(drawn))
        now = time.perf_counter()
        compile_s = self.compiler.seconds - compiled
        running = Running(
            request=request,
            row=row,
            blocks=blocks,
            tokens=[int(token)],
            logprobs=[logprob],
            prefill_s=now - admitted - compile_s,
        )
        self.running[row] = running
        self._place(running)
        return running

    def _place(self, running: Running) -> None:
        """Enters a fresh request into the rows of the next chunk."""
        request, row, rows = running.request, running.row, self._rows
        token = running.tokens[0]
        running.active = request.max_new_tokens > 1 and token not in request.stop_ids
        rows.tokens[row] = token
        rows.active[row] = running.active
        rows.remaining[row] = request.max_new_tokens - 1
        rows.drawn[row] = 1
        rows.seeds[row] = request.seed
        rows.stop_ids[row] = -1
        rows.stop_ids[row, : len(request.stop_ids)] = request.stop_ids
        mine = SamplingRows.of([request.sampling])
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(rows.sampling, name)[row] = getattr(mine, name)[0]

    def step(self) -> list[Running]:
        """One decode chunk over all rows; returns the requests that drew tokens in it."""
        started, compiled = time.perf_counter(), self.compiler.seconds
        rows = self._device_rows()
        assert self.cache is not None, "nothing has been admitted"
        self.cache, rows, drawn = run_decode(self.compiler, self.lm.params, self.cache, rows)
        rows, drawn = jax.device_get((rows, drawn))
        self._rows = jax.tree.map(np.array, rows)
        took = time.perf_counter() - started - (self.compiler.seconds - compiled)
        return [r for r in self.running.values() if r.active and self._take(r, drawn, took)]

    def _device_rows(self) -> Rows:
        return jax.tree.map(jnp.asarray, self._rows)

    def _take(self, running: Running, drawn: Drawn, took: float) -> bool:
        emitted = drawn.emitted[:, running.row]
        running.tokens += drawn.tokens[emitted, running.row].tolist()
        running.logprobs += drawn.logprobs[emitted, running.row].tolist()
        running.active = bool(self._rows.active[running.row])
        # A request that ends inside a chunk took its share of the chunk's steps.
        running.decode_s += took * float(emitted.sum()) / emitted.size
        return bool(emitted.any())

    def stop(self, running: Running) -> None:
        """Ends a request early, as a stop string does; `release` it next."""
        running.active = False
        self._rows.active[running.row] = False

    def release(self, running: Running) -> None:
        """Frees the row and the blocks of a request that has ended."""
        del self.running[running.row]
        self._allocator.release(running.blocks)

    def counted(self, running: Running) -> Counted:
        """What the program has counted of a request."""
        assert self.cache is not None
        counters, row = jax.device_get(self.cache.counters), running.row
        heads = tuple(
            CountedHead(
                layer,
                head,
                int(of.reranks[row, at]),
                float(of.overlap[row, at]),
                float(of.rco[row, at]),
                int(of.choices[row, at]),
            )
            for layer, of in enumerate(counters.heads)
            if of is not None
            for at, head in enumerate(self.program.layout.slotted(layer))
        )
        return Counted(
            int(counters.reranks[row]),
            int(counters.promoted[row]),
            int(counters.offloaded[row]),
            heads,
        )


def _first_token(
    program: Program, params: Any, x: jax.Array, rows: SamplingRows, seeds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws from the last prompt token's hidden state x [1, D]: token [1] and log-probability."""
    logits = program.decoder.logits(params, x)
    return sample(logits, rows, step_keys(seeds, jnp.zeros_like(rows.top_k)))


def free_rows(count: int) -> Rows:
    """Rows of a batch in which nothing runs."""
    return Rows(
        tokens=jnp.zeros(count, jnp.int32),
        active=jnp.zeros(count, bool),
        remaining=jnp.zeros(count, jnp.int32),
        drawn=jnp.zeros(count, jnp.int32),
        seeds=jnp.zeros(count, jnp.uint32),
        stop_ids=jnp.full((count, MAX_STOP_IDS), -1, jnp.int32),
        sampling=SamplingRows.of([Sampling()] * count),
    )
