"""The routes that generate, and the end of a request whose client has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from flexijax.server.asked import new_tokens_of, sampling_of, shown_of
from flexijax.server.chat import ChatReply
from flexijax.server.completions import CompletionReply
from flexijax.server.errors import documented
from flexijax.server.gate import ClientGone
from flexijax.server.job import Job
from flexijax.server.reply import Reply, body
from flexijax.server.requests import ChatRequest, CompletionRequest
from flexijax.server.service import Service

_T = TypeVar("_T")
# A comment every so often keeps proxies from closing a stream on which nothing comes.
_PING_S = 15


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: str
    data: list[Model]


def add_generation(app: FastAPI, service: Service) -> None:
    """Completions, chats, and the model that answers them."""
    words, fingerprint = service.words, f"fp_{service.lm.fingerprint}"

    @app.post("/v1/completions", responses=_answers(Completion))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        service.check_model(asked.model)
        shown = shown_of(asked)
        sampling = sampling_of(asked, shown, new_seed=service.new_seed())

        def ids() -> list[list[int]]:
            return [words.ids(one, special=asked.add_special_tokens) for one in asked.prompt]

        job = await _unless_gone(
            request,
            service.submit(
                ids,
                prompts=len(asked.prompt),
                choices=asked.n or 1,
                max_new_tokens=new_tokens_of(asked),
                sampling=sampling,
                cache_salt=asked.cache_salt or "",
            ),
        )
        echoes = [""] * len(asked.prompt)
        if asked.echo:
            echoes = [one if isinstance(one, str) else words.text(one) for one in asked.prompt]
        reply = CompletionReply(
            job=job,
            words=words,
            model=asked.model or service.settings.names[0],
            fingerprint=fingerprint,
            shown=shown,
            token_ids=bool(asked.return_token_ids),
            echoes=echoes,
        )
        return await _answered(reply, request, stream=bool(asked.stream))

    @app.post("/v1/chat/completions", responses=_answers(ChatCompletion))
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        service.check_model(asked.model)
        shown = shown_of(asked)
        sampling = sampling_of(asked, shown, new_seed=service.new_seed())
        messages = [message.plain() for message in asked.messages]
        job = await _unless_gone(
            request,
            service.submit(
                lambda: [words.ids(words.chat(messages))],
                prompts=1,
                choices=asked.n or 1,
                max_new_tokens=new_tokens_of(asked),
                sampling=sampling,
                cache_salt=asked.cache_salt or "",
            ),
        )
        reply = ChatReply(
            job=job,
            words=words,
            model=asked.model or service.settings.names[0],
            fingerprint=fingerprint,
            shown=shown,
            token_ids=bool(asked.return_token_ids),
            echoes=[""],
        )
        return await _answered(reply, request, stream=bool(asked.stream))

    def card(name: str) -> Model:
        return Model(
            id=name,
            created=service.created,
            object="model",
            owned_by="flexijax",
            max_model_len=service.engine.max_context,  # pyright: ignore[reportCallIssue]
        )

    @app.get("/v1/models", responses=documented())
    async def models() -> ModelList:
        return ModelList(object="list", data=[card(name) for name in service.settings.names])

    @app.get("/v1/models/{name:path}", responses=documented(404))
    async def model(name: str) -> Model:
        service.check_model(name)
        return card(name)


async def _answered(reply: Reply[Any], request: Request, *, stream: bool) -> Response:
    if stream:
        return _Events(reply)
    whole = await _unless_gone(request, reply.whole())
    return Response(body(whole), media_type="application/json")


class _Events(EventSourceResponse):
    """Ends the job however the response ends, even before its first event."""

    def __init__(self, reply: Reply[Any]) -> None:
        super().__init__(reply.events(), ping=_PING_S, sep="\n")
        self._job: Job = reply.job

    @staticmethod
    async def _listen_for_exit_signal() -> None:
        # Its own looks twice a second, for ever, whether the server has ended; streams are told
        # otherwise here.
        await asyncio.Event().wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """What comes of `work`, which is cancelled when the client leaves. Raises ClientGone then."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answers(kind: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    whole: dict[int | str, dict[str, Any]] = {200: {"model": kind, "content": events}}
    return whole | documented(404, 429)
