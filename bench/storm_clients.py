"""What the clients of `bench.serving_storm` do to a server, and what each may be answered."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bench.storm_wire import Asked, Fault, Wire, answered, post, told


@dataclasses.dataclass
class Client:
    """One place in the crowd. stall_s: for how long one stops reading or writing, at most; until:
    seconds of `time.monotonic`, beyond which nobody does."""

    url: str
    asked: list[Asked]
    draw: random.Random
    stall_s: float
    oversized: int
    until: float = float("inf")

    async def right(self) -> str:
        """Two requests, one after the other on the same connection."""
        found = ""
        async with await Wire.open(self.url) as wire:
            for _ in range(2):
                asked = self.draw.choice(self.asked)
                await wire.send(asked.raw())
                found = await answered(wire, asked)
                if found != "200":
                    break
        return await self._rested(found, wire.wait_s)

    async def stream(self) -> str:
        """A stream that is read as it comes."""
        async with await Wire.open(self.url) as wire:
            asked = self.draw.choice(self.asked)
            await wire.send(asked.raw(stream=True))
            found = await answered(wire, asked)
        return await self._rested(found, wire.wait_s)

    async def stalled(self) -> str:
        """A stream whose reader stops reading after the first event, and goes on much later."""
        async with await Wire.open(self.url) as wire:
            asked = self.draw.choice(self.asked)
            logprobs = True if "messages" in asked.body else 0
            await wire.send(asked.raw(stream=True, logprobs=logprobs))
            found = await answered(wire, asked, pause=self._while())
        return await self._rested(found, wire.wait_s)

    async def unread(self) -> str:
        """An answer of megabytes, more than the system keeps, of which nothing is read."""
        async with await Wire.open(self.url) as wire:
            body = {"prompt": "a b c " * 120_000, "return_token_strs": True}
            await wire.send(post("/tokenize", json.dumps(body).encode()))
            await asyncio.sleep(self._while())
            wire.reset()
        return "left"

    async def killed(self) -> str:
        """Goes away while its request waits, is read or is answered."""
        async with await Wire.open(self.url) as wire:
            await wire.send(self.draw.choice(self.asked).raw(stream=self.draw.random() < 0.5))
            await asyncio.sleep(self.draw.expovariate(1.0))
            wire.reset()
        return await self._rested("left")

    async def half(self) -> str:
        """Half of a request; then its end much later, or nothing more until the server hangs up."""
        async with await Wire.open(self.url) as wire:
            asked = self.draw.choice(self.asked)
            whole = asked.raw()
            cut = self.draw.randrange(1, len(whole))
            await wire.send(whole[:cut])
            await asyncio.sleep(self._while())
            if self.draw.random() < 0.3:
                return "left"
            await wire.send(whole[cut:])
            return await self._rested(await answered(wire, asked), wire.wait_s)

    async def malformed(self) -> str:
        """Something that is no request that this server knows."""
        good = self.draw.choice(self.asked)
        content = json.dumps(good.body).encode()
        cut = self.draw.randrange(1, len(content))
        kind, raw = self.draw.choice(
            (
                ("no JSON", post(good.path, content[:cut])),
                ("no JSON", post(good.path, b"\x00\xff" * cut)),
                ("nested", post(good.path, b"[" * 5000)),
                ("no field", good.raw(no_such_field=1)),
                ("no value", good.raw(temperature="hot")),
                ("unsupported", good.raw(logit_bias={"1": 1})),
                ("no model", good.raw(model="another")),
                ("no content type", post(good.path, content, kind="text/plain")),
                ("no route", post("/v1/nothing", content)),
            )
        )
        found = await self._refusal(raw)
        return f"{kind}: {found}"

    async def no_http(self) -> str:
        """Bytes that are nothing at all."""
        async with await Wire.open(self.url) as wire:
            await wire.send(self.draw.choice((b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\n")))
            wire.writer.write_eof()
            await wire.ended()
        return await self._rested("answered or closed")

    async def too_large(self) -> str:
        """A prompt that is longer than the model reads, or a body longer than the server does."""
        many = "a b c " * self.oversized
        body: dict[str, Any] = {"prompt": many, "max_tokens": 4}
        if self.draw.random() < 0.2:
            body["prompt"] = many * (1 + (5 << 20) // len(many))
        return await self._refusal(post("/v1/completions", json.dumps(body).encode()))

    async def idle(self) -> str:
        """Keeps a connection that nothing is asked on, after one answer or from the beginning."""
        async with await Wire.open(self.url) as wire:
            if self.draw.random() < 0.5:
                await wire.send(b"GET /health HTTP/1.1\r\nHost: storm\r\n\r\n")
                status, headers, body = await wire.whole()
                if status != 200:
                    return told(status, headers, body)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wire.ended(), self._while())
        return "held"

    async def _refusal(self, raw: bytes) -> str:
        async with await Wire.open(self.url) as wire:
            await wire.send(raw)
            status, headers, body = await wire.whole()
        if status < 400:
            raise Fault(f"{raw[:300]!r} was answered with {status}")
        return await self._rested(told(status, headers, body), wire.wait_s)

    async def _rested(self, found: str, wait_s: float = 0.0) -> str:
        """After a pause, as long as the server said or somewhat less: nobody asks again at once."""
        await asyncio.sleep(self.draw.uniform(0.5, 1) * min(max(wait_s, 1), self._left()))
        return found

    def _while(self) -> float:
        return min(self.draw.uniform(0.2, 1) * self.stall_s, self._left())

    def _left(self) -> float:
        return max(self.until - time.monotonic(), 0.1)


# Of a hundred connections, how many are of each kind.
SHARES: dict[Callable[[Client], Awaitable[str]], int] = {
    Client.right: 20,
    Client.stream: 16,
    Client.killed: 18,
    Client.stalled: 12,
    Client.half: 12,
    Client.idle: 9,
    Client.malformed: 7,
    Client.too_large: 3,
    Client.no_http: 2,
    Client.unread: 1,
}


class Crowd:
    """Connections that are all open at once. seen: how often each kind came to what."""

    def __init__(self, clients: list[Client], *, patience_s: float) -> None:
        self._clients, self._patience_s = clients, patience_s
        self.seen: dict[str, int] = {}
        self.faults: list[str] = []
        self.ending = False

    async def run(self, seconds: float) -> None:
        """Until then each begins anew when it is done, and then ends what it is at."""
        kinds = [kind for kind, share in SHARES.items() for _ in range(share)]
        # Evenly mixed, however few there are.
        kinds = [kinds[at * 37 % 100] for at in range(len(self._clients))]
        until = time.monotonic() + seconds
        each = zip(self._clients, kinds, strict=True)
        await asyncio.gather(*(self.one(client, kind, until) for client, kind in each))

    async def one(
        self, client: Client, kind: Callable[[Client], Awaitable[str]], until: float
    ) -> None:
        """One place in it; until: seconds of `time.monotonic`."""
        client.until = until
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(self._patience_s):
                    found = await kind(client)
            except TimeoutError:
                found = self._fault(kind, f"no end within {self._patience_s:.0f} s")
            except (Fault, ValueError, KeyError) as error:
                found = self._fault(kind, f"{type(error).__name__}: {error}")
            except (OSError, EOFError) as error:
                found = f"closed ({type(error).__name__})"
                if self.ending:
                    # The server is going: there is nobody to ask any more, or soon.
                    until = min(until, time.monotonic() + 1)
                    found += " while it ended"
                    await asyncio.sleep(0.2)
                elif kind is not Client.half:
                    found = self._fault(kind, found)
            name = f"{kind.__name__}: {found}"
            self.seen[name] = self.seen.get(name, 0) + 1

    def _fault(self, kind: Callable[[Client], Awaitable[str]], what: str) -> str:
        self.faults.append(f"{kind.__name__}: {what}")
        return "FAULT"
