"""The engine: admits requests into slots of a batch and runs decode chunks over all of them."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.cache import Cache, init
from flexijax.engine.batch import SampledTokens, empty_batch
from flexijax.engine.execute import (
    Place,
    compile_decode,
    run_admit,
    run_commit,
    run_decode,
    run_refit,
)
from flexijax.engine.first_token import FirstToken, first_token
from flexijax.engine.prefiller import Prefiller, PrefillResult
from flexijax.engine.program import Program, Progress, Runner
from flexijax.engine.sampling import METHODS, SamplingRows, method_of
from flexijax.engine.sequence import Request, Sequence
from flexijax.engine.stats import SequenceStats, sequence_stats
from flexijax.models.language_model import LanguageModel


class Engine:
    """Runs requests through one cache of `program.layout.sizes.batch` slots.

    `admit` reads a prompt into a free slot and samples its first token; `step` runs one decode
    chunk over all slots; `release` frees one. Only between these calls does Python look at
    anything.
    """

    def __init__(self, lm: LanguageModel, program: Program, *, progress: Progress | None) -> None:
        self.lm, self.program = lm, program
        self.runner = Runner(progress)
        sizes = program.layout.sizes
        # Made when the first request comes, since compiling takes memory that it then can have.
        self.cache: Cache | None = None
        self._prefiller = Prefiller(program.decoder, lm.params, program.prefill_spec(), self.runner)
        self._allocator = BlockAllocator(sizes.blocks)
        self.running: dict[int, Sequence] = {}
        self._batch = jax.tree.map(np.array, empty_batch(sizes.batch))

    def blocks_of(self, request: Request) -> int:
        """Blocks that a request may come to need."""
        tokens = len(request.tokens) + request.max_new_tokens
        return -(-tokens // self.program.layout.sizes.page_size)

    def can_admit(self, request: Request) -> bool:
        """Whether a slot and enough blocks are free."""
        free = len(self.running) < self.program.layout.sizes.batch
        return free and self._allocator.can_allocate(self.blocks_of(request))

    def admit(self, request: Request, label: str, prompt: PrefillResult | None = None) -> Sequence:
        """Reads the prompt, samples the first token and puts the request into a free slot.

        label: what progress calls it. prompt: where it has been read already, which it survives.
        The caller has asked `can_admit`.
        """
        self._serve(request)
        batch, runner, params = self.program.layout.sizes.batch, self.runner, self.lm.params
        slot = next(at for at in range(batch) if at not in self.running)
        blocks = self._allocator.allocate(self.blocks_of(request))
        admitted, compiled = time.perf_counter(), runner.seconds
        if self.cache is None:
            if request.max_new_tokens > 1:
                compile_decode(runner, self.program, params, self._device_batch())
            self.cache = init(self.program.layout, self.program.policy)
        if prompt is None:
            x = self._read(request, slot, blocks, label)
        else:
            self.cache = prompt.commit(runner, self.program, self.cache, row=slot, blocks=blocks)
            x = prompt.x
        sampling = SamplingRows.of([request.sampling])
        seeds = jnp.asarray([request.seed], jnp.uint32)
        args = (params, x, sampling, seeds)
        first = FirstToken(self.program.decoder, self.program.sampling)
        sampled = runner.run("first token", first_token, first, args)
        token, logprob = (float(value[0]) for value in jax.device_get(sampled))
        _check_finite(request, [logprob])
        sequence = Sequence(
            request=request,
            slot=slot,
            blocks=blocks,
            tokens=[int(token)],
            logprobs=[logprob],
            prefill_s=time.perf_counter() - admitted - (runner.seconds - compiled),
        )
        self.running[slot] = sequence
        self._place(sequence)
        return sequence

    def _read(self, request: Request, row: int, blocks: list[int], label: str) -> jax.Array:
        """The prompt into its row, layer by layer; the last token's hidden state [1, D]."""
        place = Place.of(self.program, row, blocks, len(request.tokens))
        reading = self._prefiller.begin(request.tokens, label)
        while not reading.done:
            layer = reading.advance()
            if layer is not None:
                assert self.cache is not None
                self.cache = run_commit(
                    self.runner,
                    self.program,
                    self._prefiller.spec,
                    self.cache,
                    layer,
                    reading.kv,
                    place,
                )
        assert self.cache is not None and reading.x is not None
        self.cache = run_admit(self.cache, place)
        return reading.x

    def _serve(self, request: Request) -> None:
        """Makes the decode program one that can sample as the request asks, from now on."""
        needed = max(method_of(request.sampling), self.program.sampling, key=METHODS.index)
        if needed != self.program.sampling:
            self.program = dataclasses.replace(self.program, sampling=needed)

    def _place(self, sequence: Sequence) -> None:
        """Enters a fresh request into the batch of the next chunk."""
        request, slot, batch = sequence.request, sequence.slot, self._batch
        token = sequence.tokens[0]
        sequence.active = request.max_new_tokens > 1 and token not in request.stop_ids
        batch.tokens[slot] = token
        batch.active[slot] = sequence.active
        batch.remaining[slot] = request.max_new_tokens - 1
        batch.generated[slot] = 1
        batch.seeds[slot] = request.seed
        batch.stop_ids[slot] = -1
        batch.stop_ids[slot, : len(request.stop_ids)] = request.stop_ids
        mine = SamplingRows.of([request.sampling])
        for name in ("temperature", "top_k", "top_p", "min_p"):
            getattr(batch.sampling, name)[slot] = getattr(mine, name)[0]

    def step(self) -> list[Sequence]:
        """One decode chunk over all slots; returns the requests that generated tokens in it."""
        started, compiled = time.perf_counter(), self.runner.seconds
        assert self.cache is not None, "nothing has been admitted"
        self.cache, batch, sampled = run_decode(
            self.runner, self.program, self.lm.params, self.cache, self._device_batch()
        )
        batch, sampled = jax.device_get((batch, sampled))
        self._batch = jax.tree.map(np.array, batch)
        took = time.perf_counter() - started - (self.runner.seconds - compiled)
        took_part = [s for s in self.running.values() if s.active]
        held = {s.slot: s.held for s in took_part}
        generated = [s for s in took_part if self._take(s, sampled, took)]
        for sequence in generated:
            if sequence.active:
                self._refit(sequence, held[sequence.slot])
        return generated

    def _refit(self, sequence: Sequence, before: int) -> None:
        """Fits the scores' states anew, where the prompt was too short to; before: tokens held."""
        assert self.cache is not None
        self.cache = run_refit(
            self.runner,
            self.program,
            self.cache,
            row=sequence.slot,
            prompt=len(sequence.request.tokens),
            before=before,
        )

    def _device_batch(self) -> Any:
        return jax.tree.map(jnp.asarray, self._batch)

    def _take(self, sequence: Sequence, sampled: SampledTokens, took: float) -> bool:
        emitted = sampled.emitted[:, sequence.slot]
        sequence.tokens += sampled.tokens[emitted, sequence.slot].tolist()
        logprobs = sampled.logprobs[emitted, sequence.slot].tolist()
        _check_finite(sequence.request, logprobs)
        sequence.logprobs += logprobs
        sequence.active = bool(self._batch.active[sequence.slot])
        # A request that ends inside a chunk took its share of the chunk's steps.
        sequence.decode_s += took * float(emitted.sum()) / emitted.size
        return bool(emitted.any())

    def stop(self, sequence: Sequence) -> None:
        """Ends a request early, as a stop string does; `release` it next."""
        sequence.active = False
        self._batch.active[sequence.slot] = False

    def release(self, sequence: Sequence) -> None:
        """Frees the slot and the blocks of a request that has ended."""
        del self.running[sequence.slot]
        self._allocator.release(sequence.blocks)

    def stats(self, sequence: Sequence) -> SequenceStats:
        """What the programs have counted of a request."""
        assert self.cache is not None
        return sequence_stats(self.program.layout, self.cache, row=sequence.slot)


def _check_finite(request: Request, logprobs: list[float]) -> None:
    """Raises FloatingPointError where a token was sampled from logits that are no numbers."""
    if not all(map(math.isfinite, logprobs)):
        raise FloatingPointError(
            f"prompts[{request.index}]: the model's logits are not finite, so its tokens mean "
            "nothing; load it with dtype='float32', or check its weights"
        )
