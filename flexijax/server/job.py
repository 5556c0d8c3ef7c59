"""The choices of one response while they are answered, as the event loop sees them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from flexijax.engine.stream import Stream, Token
from flexijax.results import Generation


class Update(NamedTuple):
    """What came of one choice from one boundary to the next. end: its answer, or why there is none.

    choice: its place in its job. text: that became certain.
    """

    choice: int
    text: str
    tokens: list[Token]
    end: Generation | Exception | None


@dataclasses.dataclass
class ChoiceTimes:
    """When the tokens of a choice came, seconds of `time.perf_counter`; how many by then."""

    first: float
    last: float
    tokens: int


class Job:
    """The choices of one response; its methods are for the event loop.

    prompts: token ids. choices: of each prompt. places: that it still holds of those that may run
    or wait; one is given back when a choice ends. ended: the indices of such.
    """

    def __init__(self, *, choices: int, places: int) -> None:
        self.choices, self.places = choices, places
        self.prompts: list[list[int]] = []
        self.streams: list[Stream] = []
        self.arrived = time.perf_counter()
        self.ended: set[int] = set()
        self.times: dict[int, ChoiceTimes] = {}
        self.arrivals: asyncio.Queue[Update] = asyncio.Queue()
        self.wake: Callable[[], object] = lambda: None

    async def updates(self) -> AsyncIterator[Update]:
        """All that comes until every choice has ended, in the order in which it comes."""
        left = len(self.streams)
        while left:
            update = await self.arrivals.get()
            left -= update.end is not None
            yield update

    def cancel(self) -> None:
        """Ends all choices at the next boundary that have not ended."""
        for stream in self.streams:
            stream.cancel()
        self.wake()
