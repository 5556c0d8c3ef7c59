"""HTTP on bare connections, which can stop anywhere, and answers that are checked.

For `bench.serving_storm`: a client that behaves has no way to do so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


class Fault(Exception):
    """A wrong answer, or a refusal that does not say why."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request, and the token ids and the text that it is answered with on a quiet server."""

    path: str
    body: dict[str, Any]
    ids: tuple[int, ...] = ()
    text: str = ""

    def raw(self, **changes: Any) -> bytes:
        """All bytes of the request."""
        return post(self.path, json.dumps(self.body | changes).encode())

    def check(self, ids: tuple[int, ...], text: str) -> None:
        """Raises Fault for another answer than the quiet one."""
        if (ids, text) != (self.ids, self.text):
            raise Fault(f"{list(ids)} {text!r} in place of {list(self.ids)} {self.text!r}")


def post(path: str, content: bytes, kind: str = "application/json") -> bytes:
    """The bytes of a request with a body."""
    head = f"POST {path} HTTP/1.1\r\nHost: storm\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Wire:
    """One connection of HTTP/1.1. wait_s: seconds after which the last answer said to ask again."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self.wait_s = 0.0

    @classmethod
    async def open(cls, url: str) -> Wire:
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def send(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    def reset(self) -> None:
        """Breaks off at once, as a client that was killed does."""
        made = self.writer.get_extra_info("socket")
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()

    async def ended(self) -> bool:
        """Whether the server closes without a word; waits for that."""
        return not await self._reader.read(1)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        headers = {name.lower(): text.strip() for name, _, text in pairs}
        wait = headers.get("retry-after", "")
        self.wait_s = float(wait) if wait.isdigit() else 0.0
        return int(lines[0].split()[1]), headers

    async def parts(self, headers: dict[str, str]) -> AsyncIterator[bytes]:
        """The body as it comes."""
        if "content-length" in headers:
            yield await self._reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self._reader.readline(), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)
        await self._reader.readexactly(2)

    async def whole(self) -> tuple[int, dict[str, str], bytes]:
        """An answer to its end."""
        status, headers = await self.head()
        return status, headers, b"".join([part async for part in self.parts(headers)])


def told(status: int, headers: dict[str, str], body: bytes) -> str:
    """What a refusal says, in short. Raises Fault where it does not say why."""
    try:
        error = json.loads(body)["error"]
        message, code = error["message"], error["code"]
    except (ValueError, KeyError, TypeError):
        raise Fault(f"status {status} without a reason: {body[:100]!r}") from None
    if not message or status in (429, 503) and not headers.get("retry-after", "").isdigit():
        raise Fault(f"status {status} does not say why or until when: {body[:200]!r}")
    return f"{status} {code}"


def content_of(choice: dict[str, Any]) -> tuple[list[int], str]:
    """Ids and text of a choice, of a completion or a chat, whole or a chunk."""
    said = choice.get("message") or choice.get("delta") or {}
    return choice.get("token_ids") or [], choice.get("text") or said.get("content") or ""


async def answered(wire: Wire, asked: Asked, pause: float = 0.0) -> str:
    """Reads the answer to a request, a stream with a pause after its first event; what it was."""
    status, headers = await wire.head()
    if "text/event-stream" not in headers.get("content-type", ""):
        body = b"".join([part async for part in wire.parts(headers)])
        if status != 200:
            return told(status, headers, body)
        ids, text = content_of(json.loads(body)["choices"][0])
        asked.check(tuple(ids), text)
        return "200"
    ids, text, rest, done = [], "", b"", False
    async for part in wire.parts(headers):
        *events, rest = (rest + part).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: "):
                continue
            done = event == b"data: [DONE]"
            found = {} if done else json.loads(event[6:])
            if "error" in found:
                return f"stream {told(0, {}, event[6:])}"
            for choice in found.get("choices", ()):
                mine, said = content_of(choice)
                ids, text = ids + mine, text + said
        await asyncio.sleep(pause)
        pause = 0.0
    if not done:
        raise Fault("a stream ended in the middle without a word")
    asked.check(tuple(ids), text)
    return "200 stream"
