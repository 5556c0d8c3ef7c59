"""What a client is told of a request that is not answered: `{"error": {...}}`, and the status."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from flexijax.engine.stream import EngineError

# Of OpenAI's API, where it names them.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ErrorDetail(BaseModel):
    """param: the field of the request that is at fault, if one is. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is no answer."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with a status and a reason. retry_after: seconds, for a header."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.detail = ErrorDetail(
            message=message, type=_TYPES.get(status, "server_error"), param=param, code=code
        )

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads, as JSON values."""
        return ErrorResponse(error=self.detail).model_dump()

    def response(self) -> JSONResponse:
        """The whole response."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            # A browser asks for the key then, as the password of any user.
            headers["www-authenticate"] = 'Basic realm="flexijax", charset="UTF-8"'
        return JSONResponse(self.body, self.status, headers)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's schema: these statuses, and those that any route may answer with."""
    return {
        status: {"model": ErrorResponse, "description": _TYPES.get(status, "error")}
        for status in sorted({400, 401, 405, 408, 413, 500, 503, *statuses})
    }


class ShuttingDown(Exception):
    """The end of a choice that the engine did not bring to one in time."""


def draining() -> ApiError:
    """For what comes, or has not ended, when the server shuts down."""
    message = "the server is shutting down: ask another one, or again later"
    return ApiError(503, message, code="shutting_down", retry_after=10)


def of_engine(error: Exception) -> ApiError:
    """What the end of a request in the engine means for its client."""
    if isinstance(error, ValueError):
        return of_value(error)
    if isinstance(error, ShuttingDown):
        return draining()
    if isinstance(error, EngineError):
        return ApiError(503, str(error), code="engine_failed", retry_after=1)
    if isinstance(error, FloatingPointError):
        return ApiError(500, str(error), code="not_finite")
    return ApiError(500, f"the request failed: {type(error).__name__}", code="internal_error")


def of_value(error: ValueError, param: str | None = None) -> ApiError:
    """What the engine refuses; its messages begin with the argument where they name one."""
    message = str(error)
    if param is None:
        name = message.split("=")[0]
        param = name if name in ("temperature", "top_k", "top_p", "min_p", "stop") else None
    too_long = "max_new_tokens=" in message
    code = "context_length_exceeded" if too_long else "invalid_value"
    return ApiError(400, message, param=param, code=code)
