"""`/v1/chat/completions`: the answer in OpenAI's types."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice as WholeChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob

from flexijax.engine.stream import Token
from flexijax.server.job import Update
from flexijax.server.reply import Choice, Reply


class ChatReply(Reply[ChatCompletion]):
    """The assistant's next message."""

    def response(self, choices: list[Choice], usage: CompletionUsage) -> ChatCompletion:
        return ChatCompletion(
            **self._common(),
            object="chat.completion",
            choices=[self._whole(choice) for choice in choices],
            usage=usage,
        )

    def chunk(
        self, choice: Choice, update: Update, usage: CompletionUsage | None
    ) -> ChatCompletionChunk:
        delta = ChoiceDelta(content=update.text) if update.text else ChoiceDelta()
        return self._chunk([self._part(choice, delta, update.tokens)], usage)

    def first(self, choices: list[Choice]) -> Iterator[ChatCompletionChunk]:
        for choice in choices:
            yield self._chunk([self._part(choice, ChoiceDelta(role="assistant", content=""), [])])

    def last(self, usage: CompletionUsage) -> ChatCompletionChunk:
        return self._chunk([], usage)

    def _common(self) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(
        self, choices: list[ChunkChoice], usage: CompletionUsage | None = None
    ) -> ChatCompletionChunk:
        told: dict[str, Any] = {} if usage is None else {"usage": usage}
        return ChatCompletionChunk(
            **self._common(), object="chat.completion.chunk", choices=choices, **told
        )

    def _whole(self, choice: Choice) -> WholeChoice:
        message = ChatCompletionMessage(role="assistant", content=choice.text, refusal=None)
        logprobs = None
        if self.shown.logprobs:
            logprobs = ChoiceLogprobs(content=self._logprobs(choice.tokens), refusal=None)
        return WholeChoice(
            finish_reason=choice.finish_reason,
            index=choice.index,
            logprobs=logprobs,
            message=message,
            **self.ids_of(choice.tokens),
        )

    def _part(self, choice: Choice, delta: ChoiceDelta, tokens: list[Token]) -> ChunkChoice:
        logprobs = None
        if self.shown.logprobs and tokens:
            logprobs = ChunkLogprobs(content=self._logprobs(tokens), refusal=None)
        return ChunkChoice(
            delta=delta,
            finish_reason=choice.finish_reason,
            index=choice.index,
            logprobs=logprobs,
            **self.ids_of(tokens),
        )

    def _logprobs(self, tokens: list[Token]) -> list[ChatCompletionTokenLogprob]:
        words = self.words.of_tokens
        return [
            ChatCompletionTokenLogprob(
                token=words.text(token.id),
                bytes=list(words.data(token.id)),
                logprob=token.logprob,
                top_logprobs=[
                    TopLogprob(
                        token=words.text(other), bytes=list(words.data(other)), logprob=logprob
                    )
                    for other, logprob in token.alternatives
                    if math.isfinite(logprob)
                ],
            )
            for token in tokens
        ]
