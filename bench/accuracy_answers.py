"""Greedy answers of several caches to one prompt that is read once, kept in a file of records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.accuracy_tasks import Case
from flexijax.config import CacheConfig
from flexijax.engine.continuation import read
from flexijax.engine.plan import make_program
from flexijax.engine.program import BOUNDARY_STEPS, Program, Progress
from flexijax.engine.requests import make_requests
from flexijax.evaluate import key_of_model, key_of_program
from flexijax.generate import run_requests
from flexijax.models.language_model import LanguageModel
from flexijax.profiles.documents import prompt_ids
from flexijax.profiles.records import Records
from flexijax.profiling.choose import with_profile


class Answers:
    """Asks caches of one model; each has one program for every prompt.

    configs: by name, of one page size, dtype and implementation, since they share what was read.
    most_tokens: of a prompt. new_tokens: of the longest answer. records: a file of answers, which
    are not generated again where weights, prompt, policy, sizes, jax's version and
    `evaluate.VERSION` are the same. progress: called with (stage, done, total).
    Raises ValueError as `generate` does.
    """

    def __init__(
        self,
        lm: LanguageModel,
        configs: Mapping[str, CacheConfig],
        *,
        most_tokens: int,
        new_tokens: int,
        records: Path | None,
        progress: Progress | None,
    ) -> None:
        self._lm, self._most, self._progress = lm, most_tokens, progress
        self._key_of_model = key_of_model(lm)
        self._known = Records(records)
        self._caches = {name: with_profile(lm, of, prompts=[]) for name, of in configs.items()}
        self._programs: dict[str, Program] = {}
        for name, (cache, _) in self._caches.items():
            new = -(-new_tokens // cache.chunk_steps) * cache.chunk_steps
            self._programs[name] = make_program(
                lm,
                cache,
                max_tokens=most_tokens + new,
                max_new_tokens=new,
                boundary_steps=BOUNDARY_STEPS,
                shared_reading=True,
            )

    def answers(self, case: Case) -> dict[str, dict[str, Any]]:
        """By config: "text", its number of "tokens", and that of the prompt's, "context"."""
        lm = self._lm
        assert lm.tokenizer is not None
        # Document and question in the model's chat form.
        prompt = prompt_ids(case.document, lm.tokenizer, max_tokens=self._most)
        shared = [*self._key_of_model, prompt, case.new_tokens]
        keys = {name: [*shared, *key_of_program(made)] for name, made in self._programs.items()}
        missing = [name for name, key in keys.items() if self._known.get(*key) is None]
        if missing:
            label = f"{case.document.task}[{case.document.index}]"
            made = [self._programs[name] for name in missing]
            reading = read(lm, made, prompt, progress=self._progress, label=label)
            for name in missing:
                cache, choice = self._caches[name]
                found = run_requests(
                    lm,
                    self._programs[name],
                    make_requests(lm, [prompt], case.new_tokens, None),
                    None,
                    cache,
                    choice,
                    progress=self._progress,
                    prompt=reading,
                )[0]
                value = {"text": found.text, "tokens": len(found.token_ids)}
                value |= {"context": len(prompt)}
                self._known.add(*keys[name], value=value)
        return {name: self._known.get(*key) or {} for name, key in keys.items()}
