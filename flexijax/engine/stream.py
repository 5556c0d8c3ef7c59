"""One request of an engine, as its caller sees it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import NamedTuple

from flexijax.results import Alternatives, Generation


class Token(NamedTuple):
    """One that was generated. logprob: under the model itself, before temperature and filters.

    alternatives: the likeliest tokens in its place, where the request asks for any.
    """

    id: int
    logprob: float
    alternatives: Alternatives = ()


class EngineError(RuntimeError):
    """A program failed while this request ran; the engine goes on with others."""


class Stream:
    """Pieces of a request's text as they become certain: iterate over them, also with `async for`.

    Whoever waits for a piece drives the engine, and with it all its requests; several threads and
    tasks may wait at once. Without a tokenizer there are no pieces, only a `result`.
    """

    def __init__(
        self, wait: Callable[[Callable[[], bool]], None], cancel: Callable[[], None]
    ) -> None:
        """wait: drives the engine for as long as what it is given says True."""
        self._wait, self._cancel = wait, cancel
        self._pieces: deque[str] = deque()
        # All that have come, the one that ends it left out; only ever appended to.
        self.tokens: list[Token] = []
        self._generation: Generation | None = None
        self._error: Exception | None = None

    @property
    def done(self) -> bool:
        """Whether no piece will come any more."""
        return self._generation is not None or self._error is not None

    @property
    def error(self) -> Exception | None:
        """Why it ended without a `result`, if it did."""
        return self._error

    @property
    def outcome(self) -> Generation | Exception | None:
        """Its `result`, or why there is none; None until then."""
        return self._generation if self._error is None else self._error

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self._wait(self._waits)
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    async def __aiter__(self) -> AsyncGenerator[str, None]:
        try:
            while True:
                if self._waits():
                    await asyncio.to_thread(self._wait, self._waits)
                elif self._pieces:
                    yield self._pieces.popleft()
                elif self._error is not None:
                    raise self._error
                else:
                    return
        finally:
            # Whoever stops listening wants no more of it.
            self.cancel()

    def result(self) -> Generation:
        """Waits for the end, and returns all of it.

        Pieces that nobody has taken by then stay to be taken. Raises what ended the request:
        `EngineError`, `FloatingPointError` for logits that are no numbers, or `ValueError` where it
        could never be admitted.
        """
        self._wait(lambda: not self.done)
        if self._error is not None:
            raise self._error
        assert self._generation is not None
        return self._generation

    def cancel(self) -> None:
        """Ends the request at the next boundary, if it has not ended; it keeps what it has."""
        if not self.done:
            self._cancel()

    def _waits(self) -> bool:
        """Whether there is nothing to hand out yet."""
        return not self._pieces and not self.done

    def take(self) -> list[str]:
        """The pieces that have come since they were last taken, without waiting."""
        pieces = list(self._pieces)
        self._pieces.clear()
        return pieces

    def put(self, piece: str, token: Token | None = None) -> None:
        """For the engine: the next piece, and the token that it became certain with."""
        if token is not None:
            self.tokens.append(token)
        if piece:
            self._pieces.append(piece)

    def end(self, generation: Generation) -> None:
        """For the engine: all of it has come."""
        self._generation = generation

    def fail(self, error: Exception) -> None:
        """For the engine: no more will come, and why."""
        self._error = error
