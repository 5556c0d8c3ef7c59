"""A prompt through the model, chunk by chunk, and from there into the cache of any program."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.arrays import Prompt
from flexijax.cache.cache import Cache
from flexijax.cache.prefill_kv import PrefillKV, PrefillSpec, empty_prefill_kv
from flexijax.engine.execute import run_commit
from flexijax.engine.prefill import PrefillProgram, prefill_chunk
from flexijax.engine.program import Program, Runner
from flexijax.models.decoder import DecoderLike, Params


@dataclasses.dataclass(frozen=True)
class PrefillResult:
    """What a prompt left behind: everything that a cache needs of it.

    program: that it was read by. length: its tokens. kv: keys and values of all layers and heads,
    its last queries, and what policies saw. x: the last token's hidden state [1, D].
    """

    program: PrefillProgram
    length: int
    kv: PrefillKV
    x: jax.Array

    def commit(
        self,
        runner: Runner,
        program: Program,
        cache: Cache | None,
        *,
        row: int,
        blocks: Sequence[int],
        release: bool = False,
    ) -> Cache:
        """The prompt in row `row` of a cache of `program` (donated; None: an empty one).

        blocks: one block id a page, at least ceil(length / page) of them. release: see
        `run_commit`. Raises ValueError where the program is of another model, length or dtype, or
        its policy observes what was not observed here.
        """
        self._check(program)
        table = np.zeros(program.layout.sizes.pages, np.int32)
        table[: len(blocks)] = blocks
        observers, policy = self.program.spec.observers, program.policy
        at = observers.index(policy) if policy in observers else None
        place = (jnp.int32(row), jnp.asarray(table), jnp.int32(self.length))
        prompts = tuple(
            Prompt(k, v, queries, () if at is None else observed[at], *place, jnp.int32(layer))
            for layer, (k, v, queries, observed) in enumerate(
                zip(self.kv.k, self.kv.v, self.kv.queries, self.kv.observed, strict=True)
            )
        )
        return run_commit(runner, program, cache, prompts, release=release)

    def _check(self, program: Program) -> None:
        theirs, ours = program.prefill_spec(), self.program.spec
        for name in ("shape", "tokens", "dtype"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            if mine != other:
                raise ValueError(f"a prompt read with {name}={mine} cannot be used with {other}")
        if program.decoder != self.program.decoder:
            raise ValueError("a prompt read by one decoder cannot be continued by another")
        if theirs.window > ours.window or not set(theirs.observers) <= set(ours.observers):
            raise ValueError(
                f"policy {program.policy} observes queries that were not kept: name its program "
                "when the prompt is read"
            )


class Prefiller:
    """Reads prompts one after the other into the same arrays, compiled once."""

    def __init__(
        self, decoder: DecoderLike, params: Params, spec: PrefillSpec, runner: Runner
    ) -> None:
        self._program = PrefillProgram(decoder, spec)
        self._params, self._runner = params, runner
        self._kv: PrefillKV | None = None

    def read(self, tokens: Sequence[int], label: str) -> PrefillResult:
        """What the prompt leaves behind, good until the next call, which takes its arrays.

        tokens: ids, at least one. label: what progress calls the prompt.
        """
        program, progress = self._program, self._runner.progress
        chunk, length = program.spec.chunk, len(tokens)
        padded = np.zeros(-(-length // chunk) * chunk, np.int32)
        padded[:length] = tokens
        x, kv, self._kv = None, self._kv, None
        # What was observed of the last prompt is not forgotten by writing over its keys.
        if kv is None or kv.k[0].is_deleted() or program.spec.observers:
            kv = None
            kv = empty_prefill_kv(program.spec)
        for start in range(0, length, chunk):
            last = min(length - start, chunk) - 1
            piece = jnp.asarray(padded[None, start : start + chunk])
            args = (self._params, piece, jnp.int32(start), jnp.int32(last), kv)
            kv, x = self._runner.run("prefill", prefill_chunk, program, args, donate=(4,))
            if progress is not None:
                x.block_until_ready()
                progress(f"reading {label}", start + last + 1, length)
        assert x is not None
        self._kv = kv
        return PrefillResult(program, length, kv, x)
