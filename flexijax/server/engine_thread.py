"""The engine in a thread of its own, and what comes of it on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from flexijax.engine.engine import Engine
from flexijax.engine.sampling import Sampling
from flexijax.engine.stream import EngineError, Stream
from flexijax.server.job import Job, Update

_T = TypeVar("_T")


class _Following(NamedTuple):
    """A choice that has not ended. seen: a cell with how many of its tokens were handed on."""

    job: Job
    choice: int
    stream: Stream
    seen: list[int]


class EngineThread:
    """Drives an engine while there is anything to do, and sleeps otherwise.

    arrived: called on the event loop with each update, after it was put to its job.
    """

    def __init__(self, engine: Engine, arrived: Callable[[Job, Update], None]) -> None:
        self.engine, self._arrived = engine, arrived
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._new: deque[_Following] = deque()
        self._following: list[_Following] = []
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._thread = threading.Thread(target=self._run, name="flexijax-engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self.error is None and not self._stopping

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins; `loop` is where updates arrive."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Ends after the current step, and waits for that."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def submit(
        self, job: Job, *, max_new_tokens: list[int], sampling: Sampling, cache_salt: str
    ) -> None:
        """All choices of a job, from any thread; max_new_tokens: of each of its prompts.

        Raises ValueError for what the engine refuses; streams of the job so far go on.
        """
        job.wake = self._wake.set
        for prompt, most in zip(job.prompts, max_new_tokens, strict=True):
            streams = self.engine.submit_choices(
                prompt,
                n=job.choices,
                max_new_tokens=most,
                sampling=sampling,
                cache_salt=cache_salt,
            )
            for stream in streams:
                self._new.append(_Following(job, len(job.streams), stream, [0]))
                job.streams.append(stream)
        self._wake.set()
        if self.error is not None:
            raise EngineError("the engine has ended")

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """function() between two steps."""
        future: Future[_T] = Future()
        self._calls.append((future, function))
        self._wake.set()
        return future

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.wait()
                self._wake.clear()
                left = True
                while left and not self._stopping:
                    self._answer_calls()
                    left = self.engine.step()
                    self.deliver()
        except BaseException as error:  # whatever it was, nobody may wait for this thread
            self.error = error
            self._fail_all(error)

    def _answer_calls(self) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

    def deliver(self) -> None:
        """Hands on what has come since the last time; one call of the loop for all of it."""
        while self._new:
            self._following.append(self._new.popleft())
        updates, left = [], []
        for one in self._following:
            # Asked first: what ends it comes after its last token.
            end = one.stream.outcome
            tokens = one.stream.tokens[one.seen[0] :]
            text = "".join(one.stream.take())
            one.seen[0] += len(tokens)
            if text or tokens or end is not None:
                updates.append((one.job, Update(one.choice, text, tokens, end)))
            if end is None:
                left.append(one)
        self._following = left
        if updates:
            self._hand_over(updates)

    def _hand_over(self, updates: list[tuple[Job, Update]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._take, updates)
        except RuntimeError:  # the loop has ended, and all that listened with it
            self._stopping = True

    def _take(self, updates: list[tuple[Job, Update]]) -> None:
        for job, update in updates:
            job.arrivals.put_nowait(update)
            self._arrived(job, update)

    def _fail_all(self, error: BaseException) -> None:
        failed = EngineError(f"the engine has ended: {type(error).__name__}")
        following = [*self._following, *self._new]
        self._hand_over([(one.job, Update(one.choice, "", [], failed)) for one in following])
        while self._calls:
            self._calls.popleft()[0].cancel()
