"""The routes, and what is said of those that fail."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from flexijax.server.errors import ApiError, ErrorResponse, documented, draining
from flexijax.server.gate import Gate
from flexijax.server.generation import add_generation
from flexijax.server.reply import body
from flexijax.server.requests import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from flexijax.server.service import Service

_PAGE = Path(__file__).with_name("page.html")
_PAGE_MAY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
_PAGE_MAY += "connect-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'"


def create_app(service: Service) -> FastAPI:
    """The application over a service, which it starts and closes."""

    @contextlib.asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.close()

    # No pages of documentation: they load scripts from elsewhere.
    app = FastAPI(
        title="flexijax", version=_version(), lifespan=running, docs_url=None, redoc_url=None
    )
    settings = service.settings
    app.add_middleware(
        Gate,  # pyright: ignore[reportArgumentType]
        metrics=service.metrics,
        api_key=settings.api_key,
        max_body=settings.max_body,
    )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    _add_errors(app)
    add_generation(app, service)
    _add_words(app, service)
    _add_state(app, service)
    app.openapi = functools.partial(_schema, app, app.openapi)
    return app


def _schema(app: FastAPI, made: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Without FastAPI's own answer to what is invalid, which is 400 here."""
    if app.openapi_schema is None:
        schema = made()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
    return made()


def _add_words(app: FastAPI, service: Service) -> None:
    words, tokenizer = service.words, service.lm.tokenizer

    @app.post("/tokenize", responses=documented(404), response_model=TokenizeResponse)
    async def tokenize(asked: TokenizeRequest) -> Response:
        service.check_model(asked.model)
        # Megabytes of it are written where they hold nobody up.
        content = await words.start(lambda: body(words.tokenize(asked)))
        return Response(content, media_type="application/json")

    @app.post("/detokenize", responses=documented(404))
    async def detokenize(asked: DetokenizeRequest) -> DetokenizeResponse:
        service.check_model(asked.model)
        return DetokenizeResponse(prompt=await words.start(words.detokenize, asked))

    @app.get("/tokenizer_info", responses=documented(404))
    async def tokenizer_info() -> TokenizerInfo:
        if tokenizer is None:
            raise ApiError(404, f"{service.lm.name} has no tokenizer", code="no_tokenizer")
        return TokenizerInfo(
            tokenizer_class=type(tokenizer.backend.model).__name__,
            vocab_size=service.lm.vocab_size,
            model_max_length=service.engine.max_context,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            stop_token_ids=sorted(tokenizer.stop_ids),
            chat_template=tokenizer.chat_template,
        )


def _add_state(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/health", responses={503: {"model": ErrorResponse}})
    async def health() -> dict[str, str]:
        """Answered without a key: whether new requests are taken."""
        if service.draining:
            raise draining()
        if not service.thread.alive:
            raise ApiError(503, "the engine has ended", code="engine_failed")
        return {"status": "ok"}

    @app.get("/metrics", responses=documented(), response_class=PlainTextResponse)
    async def metrics() -> Response:
        text = service.metrics.text(await service.occupancy(), service.engine.totals)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/", responses=documented(), response_class=HTMLResponse)
    async def root() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": _PAGE_MAY})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"][1:]]
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is no JSON", code="invalid_json").response()
        if first["type"] == "extra_forbidden":
            name, code = ".".join(where)[:100], "unknown_field"
            message = f"{name!r} is not supported by this server"
        else:
            name, code = ".".join(where), "invalid_value"
            message = f"{name or 'the body'}: {first['msg']}"
        return ApiError(400, message, param=name or None, code=code).response()

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        made = ApiError(error.status_code, str(error.detail)).response()
        made.headers.update(error.headers or {})
        return made


def _version() -> str:
    try:
        return version("flexijax")
    except PackageNotFoundError:
        return "unknown"
