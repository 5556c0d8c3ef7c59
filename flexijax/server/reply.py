"""What completions and chats share in answering: choices as they come, usage, events."""

from __future__ import annotations

import abc
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Generic, TypeVar

import openai
import pydantic
from openai.types import CompletionUsage
from openai.types.completion_usage import PromptTokensDetails

from flexijax.engine.stream import Token
from flexijax.results import Generation
from flexijax.server.asked import Shown
from flexijax.server.errors import ApiError, draining, of_engine
from flexijax.server.job import Job, Update
from flexijax.server.words import Words

Whole = TypeVar("Whole", bound=openai.BaseModel)
DONE = b"data: [DONE]\n\n"


@dataclasses.dataclass
class Choice:
    """What has come of one choice so far. shown: letters of its tokens, with those of its prompt.

    echo: what its text begins with.
    """

    index: int
    echo: str = ""
    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    end: Generation | None = None
    shown: int = 0

    def add(self, update: Update) -> None:
        """Raises ApiError where its end is no answer."""
        self.text += update.text
        self.tokens += update.tokens
        if isinstance(update.end, Exception):
            raise of_engine(update.end)
        if update.end is not None and update.end.finish_reason not in ("stop", "length"):
            raise draining()
        self.end = update.end

    @property
    def finish_reason(self) -> Any:
        """ "stop", "length", or None before its end."""
        return None if self.end is None else self.end.finish_reason


@dataclasses.dataclass(kw_only=True)
class Reply(abc.ABC, Generic[Whole]):
    """A response that is being made of a job.

    model: as it was asked for. fingerprint: of the model's configuration. shown: beside the text.
    token_ids: whether those are, too. echoes: what the text begins with, of each prompt.
    """

    job: Job
    words: Words
    model: str
    fingerprint: str
    shown: Shown
    token_ids: bool
    echoes: list[str]
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    async def whole(self) -> Whole:
        """All of it, when it is there. Raises ApiError; whoever gives up ends the job."""
        choices = self._choices()
        try:
            async for update in self.job.updates():
                choices[update.choice].add(update)
        finally:
            self.job.cancel()
        return self.response(choices, self._counted(choices))

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, the last one [DONE]; whoever gives up ends the job."""
        choices = self._choices()
        try:
            for event in self.first(choices):
                yield _event(event)
            async for update in self.job.updates():
                choice = choices[update.choice]
                choice.add(update)
                shows = update.tokens and (self.shown.logprobs or self.token_ids)
                if update.text or shows or update.end is not None:
                    usage = self._so_far(choice) if self.shown.usage_so_far else None
                    yield _event(self.chunk(choice, update, usage))
            if self.shown.usage:
                yield _event(self.last(self._counted(choices)))
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n".encode()
        finally:
            self.job.cancel()
        yield DONE

    @abc.abstractmethod
    def response(self, choices: list[Choice], usage: CompletionUsage) -> Whole:
        """Of all that came."""

    @abc.abstractmethod
    def chunk(
        self, choice: Choice, update: Update, usage: CompletionUsage | None
    ) -> openai.BaseModel:
        """An event of what came last."""

    @abc.abstractmethod
    def first(self, choices: list[Choice]) -> Iterator[openai.BaseModel]:
        """Events before anything came."""

    @abc.abstractmethod
    def last(self, usage: CompletionUsage) -> openai.BaseModel:
        """An event of no choice."""

    def ids_of(self, tokens: list[Token]) -> dict[str, Any]:
        """Fields of a choice that are vLLM's."""
        return {"token_ids": [token.id for token in tokens]} if self.token_ids else {}

    def _choices(self) -> list[Choice]:
        each = self.job.choices
        echoes = [echo for echo in self.echoes for _ in range(each)]
        return [Choice(at, echo, shown=len(echo)) for at, echo in enumerate(echoes)]

    def _so_far(self, choice: Choice) -> CompletionUsage:
        """Of one choice, as vLLM's."""
        prompt = len(self.job.prompts[choice.index // self.job.choices])
        made = len(choice.tokens)
        return CompletionUsage(
            prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made
        )

    def _counted(self, choices: list[Choice]) -> CompletionUsage:
        """A prompt counts once, however many choices there are."""
        prompt = sum(map(len, self.job.prompts))
        ends = [choice.end for choice in choices if choice.end is not None]
        generated = sum(len(end.token_ids) for end in ends)
        cached = sum(end.metrics.cached_tokens for end in ends[:: self.job.choices])
        return CompletionUsage(
            prompt_tokens=prompt,
            completion_tokens=generated,
            total_tokens=prompt + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


def _event(content: openai.BaseModel) -> bytes:
    # What was never set is left out: `null` in a field that a stream does not have confuses some.
    return b"data: " + body(content) + b"\n\n"


def body(content: pydantic.BaseModel) -> bytes:
    """As JSON."""
    # Of a chunk, finish_reason is null until the end, which the type of a completion leaves out.
    return content.model_dump_json(exclude_unset=True, warnings=False).encode()
