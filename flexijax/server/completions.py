"""`/v1/completions`: what is asked of the engine, and its answer in OpenAI's types."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.completion_choice import CompletionChoice, Logprobs

from flexijax.engine.stream import Token
from flexijax.server.job import Update
from flexijax.server.reply import Choice, Reply


class CompletionReply(Reply[Completion]):
    """Of a prompt that is gone on from."""

    def response(self, choices: list[Choice], usage: CompletionUsage) -> Completion:
        return self._completion([self._whole(choice) for choice in choices], usage)

    def chunk(self, choice: Choice, update: Update, usage: CompletionUsage | None) -> Completion:
        return self._completion([self._choice(choice, update.text, update.tokens)], usage)

    def first(self, choices: list[Choice]) -> Iterator[Completion]:
        for choice in choices:
            if choice.echo:
                yield self._completion([self._choice(choice, choice.echo, [])])

    def last(self, usage: CompletionUsage) -> Completion:
        return self._completion([], usage)

    def _completion(
        self, choices: list[CompletionChoice], usage: CompletionUsage | None = None
    ) -> Completion:
        told: dict[str, Any] = {} if usage is None else {"usage": usage}
        return Completion(
            id=f"cmpl-{self.id}",
            choices=choices,
            created=self.created,
            model=self.model,
            object="text_completion",
            system_fingerprint=self.fingerprint,
            **told,
        )

    def _whole(self, choice: Choice) -> CompletionChoice:
        return self._choice(choice, choice.echo + choice.text, choice.tokens)

    def _choice(self, choice: Choice, text: str, tokens: list[Token]) -> CompletionChoice:
        # Not checked: in a chunk the reason may be None.
        return CompletionChoice.construct(
            finish_reason=choice.finish_reason,
            index=choice.index,
            logprobs=self._logprobs(choice, tokens) if self.shown.logprobs else None,
            text=text,
            **self.ids_of(tokens),
        )

    def _logprobs(self, choice: Choice, tokens: list[Token]) -> Logprobs:
        offsets, words = [], self.words.of_tokens
        for token in tokens:
            offsets.append(choice.shown)
            choice.shown += len(words.shown(token.id))
        return Logprobs(
            text_offset=offsets,
            token_logprobs=[token.logprob for token in tokens],
            tokens=[words.text(token.id) for token in tokens],
            top_logprobs=self._likely(tokens) if self.shown.alternatives else None,
        )

    def _likely(self, tokens: list[Token]) -> list[dict[str, float]]:
        """By their texts, of which several may have the same; each token's own among them."""
        words, places = self.words.of_tokens, []
        for token in tokens:
            places.append({})
            for other, logprob in [*token.alternatives, (token.id, token.logprob)]:
                if math.isfinite(logprob):
                    places[-1].setdefault(words.text(other), logprob)
        return places
