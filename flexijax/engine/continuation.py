"""One prompt read once and continued by several programs: greedily, or fed with a given text.

Two greedy texts part for good at their first difference, however close the models are; feeding both
the same text compares every one of their choices.

    made = {mode: make_program(lm, CacheConfig(mode=mode), ..., rows=1) for mode in MODES}
    reading = read(lm, made["full"], prompt)
    said = Continuation(lm, made["full"], reading).greedy(48)
    fed = Continuation(lm, made["flexi"], reading)
    logits = fed.feed(said)  # float32[48, V]
    fed.promoted  # pages that came from the host meanwhile
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.engine.engine import free_rows
from flexijax.engine.prefill import Program
from flexijax.engine.prefiller import Progress, Reader, Reading
from flexijax.engine.program import Compiler, run_decode, run_forced
from flexijax.models.decoder import Params
from flexijax.models.language_model import LanguageModel


def read(
    lm: LanguageModel,
    program: Program,
    prompt: Sequence[int],
    *,
    progress: Progress | None = None,
    label: str = "the prompt",
) -> Reading:
    """The prompt's reading, for a `Continuation` by any program of the same sizes.

    prompt: token ids. progress: called with (stage, done, total).
    Raises ValueError for an empty prompt, or one that leaves no room in the program's pages.
    """
    room = program.layout.pages * program.layout.page_size
    if not 0 < len(prompt) < room:
        raise ValueError(f"prompt has {len(prompt)} tokens, it must have 1 to {room - 1}")
    compiler = Compiler(program, progress)
    return Reader(lm.params, compiler, progress).read(prompt, label)


class Continuation:
    """A prompt in the first row of a cache of its own, and what comes after it.

    Each call takes whole chunks of R = `program.rerank_interval` tokens and ends with a rerank.
    program: of any number of rows; only the first is used. first_logits: float32[V] of what comes
    after the prompt. length: tokens in the cache. cache: to look at between calls, which donate it.
    Raises ValueError when the reading is not of the program's sizes.
    """

    def __init__(
        self,
        lm: LanguageModel,
        program: Program,
        reading: Reading,
        *,
        progress: Progress | None = None,
    ) -> None:
        self._lm, self.program = lm, program
        self._compiler = Compiler(program, progress)
        blocks = range(program.layout.pages)
        self.cache = reading.commit(self._compiler, None, row=0, blocks=blocks)
        self.length = reading.length
        logits = self._compiler.run(_logits, "first token", (), lm.params, reading.x)
        self.first_logits = np.asarray(logits)[0]
        self._next = int(self.first_logits.argmax())

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Feeds given tokens; the logits of what would come after each: float32[T, V].

        tokens: ids, whole chunks of R. Raises ValueError otherwise, or where the cache has no room.
        """
        interval = self._whole_chunks(len(tokens))
        rows, found = self.program.layout.rows, []
        for start in range(0, len(tokens), interval):
            piece = np.zeros((interval, rows), np.int32)
            piece[:, 0] = tokens[start : start + interval]
            active = jnp.arange(rows) == 0
            self.cache, logits = run_forced(
                self._compiler, self._lm.params, self.cache, jnp.asarray(piece), active
            )
            found.append(np.asarray(logits[:, 0]))
        self.length += len(tokens)
        logits = np.concatenate(found)
        self._next = int(logits[-1].argmax())
        return logits

    def greedy(self, count: int) -> list[int]:
        """The next `count` most likely tokens, all of them in the cache afterwards.

        count: whole chunks of R. Raises ValueError otherwise, or where the cache has no room.
        """
        interval = self._whole_chunks(count)
        rows = self.program.layout.rows
        first = jnp.arange(rows) == 0
        state = dataclasses.replace(
            free_rows(rows),
            tokens=jnp.where(first, jnp.int32(self._next), 0),
            active=first,
            remaining=jnp.full(rows, count + 1, jnp.int32),
        )
        said = [self._next]
        for _ in range(0, count, interval):
            self.cache, state, drawn = run_decode(
                self._compiler, self._lm.params, self.cache, state
            )
            said += np.asarray(drawn.tokens)[:, 0].tolist()
        self.length += count
        self._next = said.pop()
        return said

    @property
    def promoted(self) -> int:
        """Pages that came from the host since the prompt was committed."""
        return int(self.cache.counters.promoted[0])

    def _whole_chunks(self, count: int) -> int:
        """R. Raises ValueError unless `count` tokens are whole chunks of it that fit."""
        layout, interval = self.program.layout, self.program.rerank_interval
        if count < 1 or count % interval:
            raise ValueError(f"{count} tokens are not whole chunks of rerank_interval={interval}")
        room = layout.pages * layout.page_size
        if self.length + count > room:
            raise ValueError(f"{self.length} + {count} tokens are more than the cache's {room}")
        return interval


def _logits(program: Program, params: Params, x: jax.Array) -> jax.Array:
    """Of a prompt's last hidden state x [1, D]: [1, V]."""
    return program.decoder.logits(params, x)
