"""What every request passes: its key, the size of its body, and a line in the log at its end.

Nothing of what a request says is logged, nor what an error says, which may quote it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import time
import traceback
from collections.abc import Iterable
from email.utils import formatdate

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexijax.server.errors import ApiError
from flexijax.server.metrics import ServerMetrics

logger = logging.getLogger("flexijax.server")

# From the first byte of a body to its last; what a body that is too long may go on for.
_BODY_S = 60.0
_DISCARDED = 64 << 20
_OPEN = ("/health",)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Gate:
    """ASGI middleware. api_key: None for no check. max_body: bytes."""

    def __init__(
        self, app: ASGIApp, metrics: ServerMetrics, api_key: str | None, max_body: int
    ) -> None:
        self._app, self._metrics, self._max_body = app, metrics, max_body
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                now = formatdate(usegmt=True).encode()
                message["headers"] = [*message.get("headers", ()), (b"date", now)]
            await send(message)

        try:
            self._check_key(scope)
            if scope["method"] == "POST":
                receive = await self._read(scope, receive)
            await self._app(scope, receive, noting)
        except ClientGone:
            pass
        except Exception as error:
            if not isinstance(error, ApiError):
                self._log_fault(error)
                error = ApiError(500, "the server failed here", code="internal_error")
            if not status:
                await error.response()(scope, receive, noting)
        finally:
            if status >= 400:
                self._metrics.refused(status)
            took = 1e3 * (time.perf_counter() - started)
            # Nobody wants to read each look at the metrics.
            level = logging.INFO if scope["method"] == "POST" or status >= 400 else logging.DEBUG
            told = (scope["method"], scope["path"], status or "gone", took)
            logger.log(level, "%s %s %s %.0f ms", *told)

    def _check_key(self, scope: Scope) -> None:
        if self._key is None or scope["path"] in _OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        # What a browser sends along by itself opens nothing that costs anything.
        if kind.lower() == b"basic" and scope["method"] in ("GET", "HEAD"):
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        elif kind.lower() != b"bearer":
            key = b""
        if not hmac.compare_digest(key.strip(), self._key):
            message = "no valid API key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """The whole body first; what follows it is passed on. Raises ApiError, ClientGone."""
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(400, "send JSON, with the header Content-Type: application/json")
        declared = headers.get(b"content-length", b"0")
        length = int(declared) if declared.isdigit() and len(declared) < 16 else 0
        if length > self._max_body and b"expect" in headers:
            raise self._too_long()
        try:
            async with asyncio.timeout(_BODY_S):
                parts, total = [], 0
                async for part in _parts(receive):
                    total += len(part)
                    if total <= self._max_body:
                        parts.append(part)
                    elif total > _DISCARDED:
                        break
        except TimeoutError:
            message = f"the body did not come within {_BODY_S:.0f} seconds"
            raise ApiError(408, message, code="timeout") from None
        # Most clients read no answer before all is sent, so it was read to its end.
        if total > self._max_body:
            raise self._too_long()
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts)}]

        async def replayed() -> Message:
            return whole.pop() if whole else await receive()

        return replayed

    def _too_long(self) -> ApiError:
        message = f"the body is longer than the {self._max_body} bytes that are read"
        return ApiError(413, message, code="request_too_large")

    def _log_fault(self, error: Exception) -> None:
        """Where it happened, and not what it says."""
        logger.error("%s at %s", type(error).__name__, " < ".join(_places(error)))


async def _parts(receive: Receive):
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return


def _places(error: Exception) -> Iterable[str]:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return (f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))
