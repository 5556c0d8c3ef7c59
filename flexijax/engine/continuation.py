"""One prompt read once and continued by several programs: greedily, or fed with a given text.

Two greedy texts part for good at their first difference, however close the models are; feeding both
the same text compares every one of their choices.

    made = {name: make_program(lm, CacheConfig(policy=name), ..., batch=1) for name in names}
    prompt = read(lm, list(made.values()), tokens)
    answer = Continuation(lm, made["full"], prompt).greedy(48)
    fed = Continuation(lm, made["flexi"], prompt)
    logits = fed.feed(answer)  # float32[48, V]
    fed.stats.promoted_pages  # pages that came from the host meanwhile
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flexijax.cache.cache import init
from flexijax.engine.batch import empty_batch
from flexijax.engine.execute import run_decode, run_refit, run_teacher_forced
from flexijax.engine.first_token import first_logits
from flexijax.engine.prefiller import Prefiller, PrefillResult
from flexijax.engine.program import Program, Progress, Runner, prefill_spec
from flexijax.engine.stats import SequenceStats, sequence_stats
from flexijax.models.language_model import LanguageModel


def read(
    lm: LanguageModel,
    programs: Sequence[Program],
    prompt: Sequence[int],
    *,
    progress: Progress | None = None,
    label: str = "the prompt",
) -> PrefillResult:
    """What a prompt leaves behind, for a `Continuation` by any of the programs.

    prompt: token ids. progress: called with (stage, done, total).
    Raises ValueError for an empty prompt, one that leaves no room in the programs' pages, or
    programs that cannot share a reading.
    """
    spec = prefill_spec(tuple(programs))
    if not 0 < len(prompt) < spec.tokens:
        raise ValueError(f"prompt has {len(prompt)} tokens, it must have 1 to {spec.tokens - 1}")
    prefiller = Prefiller(programs[0].decoder, lm.params, spec, Runner(progress))
    return prefiller.read(prompt, label)


class Continuation:
    """A prompt in the first row of a cache of its own, and what comes after it.

    Each call takes whole chunks of R = `program.chunk_steps` tokens.
    program: of any batch; only the first row is used. first_logits: float32[V] of what comes
    after the prompt. next_token: the most likely one now. length: tokens in the cache. cache: to
    look at between calls, which donate it.
    Raises ValueError when the prompt was not read for such a program.
    """

    def __init__(
        self,
        lm: LanguageModel,
        program: Program,
        prompt: PrefillResult,
        *,
        progress: Progress | None = None,
    ) -> None:
        self._lm, self.program = lm, program
        self._runner = Runner(progress)
        blocks = range(program.layout.sizes.pages)
        cache = init(program.layout, program.policy)
        self.cache = prompt.commit(self._runner, program, cache, row=0, blocks=blocks)
        self.length = self._prompt = prompt.length
        args = (lm.params, prompt.x)
        logits = self._runner.run("first token", first_logits, program.decoder, args)
        self.first_logits = np.array(logits)[0]  # a copy, which can be written to
        if program.suppress_ids:
            self.first_logits[list(program.suppress_ids)] = -np.inf
        self.next_token = int(self.first_logits.argmax())

    def feed(self, tokens: Sequence[int]) -> np.ndarray:
        """Feeds given tokens; the logits of what would come after each: float32[T, V].

        tokens: ids, whole chunks of R. Raises ValueError otherwise, or where the cache has no room.
        """
        steps = self._whole_chunks(len(tokens))
        batch, found = self.program.layout.sizes.batch, []
        for start in range(0, len(tokens), steps):
            piece = np.zeros((steps, batch), np.int32)
            piece[:, 0] = tokens[start : start + steps]
            self.cache, logits = run_teacher_forced(
                self._runner,
                self.program,
                self._lm.params,
                self.cache,
                jnp.asarray(piece),
                jnp.arange(batch) == 0,
            )
            found.append(np.asarray(logits[:, 0]))
            self._grown()
        logits = np.concatenate(found)
        self.next_token = int(logits[-1].argmax())
        return logits

    def greedy(self, count: int) -> list[int]:
        """The next `count` most likely tokens, all of them in the cache afterwards.

        count: whole chunks of R. Raises ValueError otherwise, or where the cache has no room.
        """
        steps = self._whole_chunks(count)
        batch = self.program.layout.sizes.batch
        first = jnp.arange(batch) == 0
        state = dataclasses.replace(
            empty_batch(batch),
            tokens=jnp.where(first, jnp.int32(self.next_token), 0),
            active=first,
            remaining=jnp.full(batch, count + 1, jnp.int32),
        )
        generated = [self.next_token]
        due, banks = np.arange(batch) == 0, range(self.program.layout.sizes.banks)
        for _ in range(0, count, steps):
            self.cache, state, sampled = run_decode(
                self._runner, self.program, self._lm.params, self.cache, banks, state, due
            )
            generated += np.asarray(sampled.tokens)[:, 0].tolist()
            # What a program returns is of the cache's mesh, and would compile the program again.
            state = jax.tree.map(jnp.asarray, jax.device_get(state))
            self._grown()
        self.next_token = generated.pop()
        return generated

    def agreeing(self, tokens: Sequence[int]) -> int:
        """How many of the tokens are the most likely ones, fed one after the other.

        Fills the cache up to whole chunks, so it is the last thing to ask. tokens: ids.
        """
        if not tokens:
            return 0
        chosen, steps = [self.next_token], self.program.chunk_steps
        if len(tokens) > 1:
            whole = -(-len(tokens) // steps) * steps
            logits = self.feed(np.resize(np.asarray(tokens, np.int32), whole).tolist())
            chosen += logits.argmax(axis=-1).tolist()
        return sum(int(a) == b for a, b in zip(chosen, tokens, strict=False))

    @property
    def stats(self) -> SequenceStats:
        """What moved and was evicted since the prompt came."""
        return sequence_stats(self.program.layout, self.cache, row=0)

    def _grown(self) -> None:
        """After each chunk of steps."""
        before, self.length = self.length, self.length + self.program.chunk_steps
        self.cache = run_refit(
            self._runner,
            self.program,
            self.cache,
            row=0,
            prompt=self._prompt,
            before=before,
        )

    def _whole_chunks(self, count: int) -> int:
        """R. Raises ValueError unless `count` tokens are whole chunks of it that fit."""
        steps, room = self.program.chunk_steps, self.program.layout.sizes.max_tokens
        if count < 1 or count % steps:
            raise ValueError(f"{count} tokens are not whole chunks of rerank_interval={steps}")
        if self.length + count > room:
            raise ValueError(f"{self.length} + {count} tokens are more than the cache's {room}")
        return steps
