"""uvicorn with what it lacks: a drain that is told, and an end for heads that never come."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flexijax.server.app import create_app
from flexijax.server.service import Service

logger = logging.getLogger("flexijax.server")

# From the first byte of a request to the end of its head; for responses to be written at the end. A
# client that takes nothing of its answer for so long is gone.
_HEAD_S, _CLOSING_S, _SEND_S = 30.0, 2, 120.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transport:
    """ssl_keyfile, ssl_certfile: both or none. shutdown_timeout: seconds that requests may go on
    after SIGTERM. started: called when the server answers."""

    ssl_keyfile: Path | None = None
    ssl_certfile: Path | None = None
    shutdown_timeout: float = 30.0
    started: Callable[[], None] = lambda: None


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet: whoever connects before the model is there is told so.

    Raises OSError.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise OSError(f"--host={host} --port={port}: {error.strerror}") from error
    return made


class Server(uvicorn.Server):
    """Serves a service until a signal comes; then new requests are refused and the others end.

    A second signal ends it at once.
    """

    def __init__(self, service: Service, transport: Transport) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=_Protocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                # Its own is renewed by those looks; see `gate.py`.
                date_header=False,
                ssl_keyfile=transport.ssl_keyfile,
                ssl_certfile=transport.ssl_certfile,
                timeout_graceful_shutdown=_CLOSING_S,
            )
        )
        self._service, self._transport = service, transport
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._asked_to_end = False
        self._over = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._transport.started()

    async def main_loop(self) -> None:
        """Without uvicorn's ten looks a second, which are half a percent of a core."""
        await self.on_tick(0)
        await self._over.wait()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of a signal; uvicorn's own would end streams at once."""
        if self._asked_to_end and self._loop is not None:
            self.force_exit = True
            self._loop.call_soon_threadsafe(self._exit)
        self.end()
        logger.warning("%s: requests may go on for %.0f s", signal.Signals(sig).name, self.patience)

    @property
    def patience(self) -> float:
        """Seconds that requests may go on."""
        return self._transport.shutdown_timeout

    def end(self) -> None:
        """Begins to drain; from any thread."""
        self._asked_to_end = True
        if self._loop is None:
            self.should_exit = True
            return
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await self._service.drained(self.patience)
            self._exit()

        if self._draining is None:
            self._draining = asyncio.ensure_future(drain())

    def _exit(self) -> None:
        self.should_exit = True
        self._over.set()


class _Protocol(H11Protocol):
    """Closes a connection on which the head of a request begins and does not end, or whose client
    takes no answer."""

    _limit: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._limit, self._unread):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch(self) -> None:
        waiting = self.conn.their_state is h11.IDLE
        if waiting and self._limit is None:
            self._limit = self.loop.call_later(_HEAD_S, self.transport.close)
        elif not waiting and self._limit is not None:
            self._limit.cancel()
            self._limit = None
