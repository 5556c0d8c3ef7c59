"""What the routes share: the engine, who may ask it for how much, and what is counted."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from collections.abc import Callable

from flexijax.engine.engine import Engine
from flexijax.engine.occupancy import Occupancy
from flexijax.engine.sampling import Sampling
from flexijax.models.language_model import LanguageModel
from flexijax.server.engine_thread import EngineThread
from flexijax.server.errors import ApiError, ShuttingDown, draining, of_engine
from flexijax.server.job import Job, Update
from flexijax.server.metrics import ServerMetrics
from flexijax.server.words import Words

# Of what an engine holds: older answers are asked for anew, and a long step is not waited for.
_FRESH_S, _PATIENCE_S = 0.25, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is told, beside its engine.

    names: that requests may call the model by; the first is shown. api_key: None for no check.
    allowed_origins: of browsers' pages. max_waiting: choices beyond the engine's rows that may
    wait. max_body: bytes of a request. seed: of the seeds of requests without one; None: anew each
    time.
    """

    names: tuple[str, ...]
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_waiting: int = 256
    max_body: int = 4 << 20
    seed: int | None = None


class Service:
    """One model's requests from their arrival to their end; for one event loop."""

    def __init__(self, lm: LanguageModel, engine: Engine, settings: Settings) -> None:
        self.lm, self.engine, self.settings = lm, engine, settings
        self.words = Words(lm, engine.max_context)
        self.thread = EngineThread(engine, self._arrived)
        self.metrics = ServerMetrics(settings.names[0])
        self.draining = False
        self.created = int(time.time())
        self._held = 0
        self._jobs: set[Job] = set()
        self._idle = asyncio.Event()
        self._random = random.Random(settings.seed)
        self._mean_s = 1.0
        self._seen: tuple[float, Occupancy] | None = None
        self._looking: asyncio.Future[Occupancy] | None = None

    async def start(self) -> None:
        """Begins to answer."""
        self._idle.set()
        self.thread.start(asyncio.get_running_loop())
        await self.occupancy()

    async def close(self) -> None:
        """Ends after the engine's current step."""
        await asyncio.to_thread(self.thread.stop)
        self.words.close()

    @property
    def most(self) -> int:
        """Choices that may run and wait."""
        return self.engine.max_requests + self.settings.max_waiting

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served."""
        if name is not None and name not in self.settings.names:
            named = ", ".join(self.settings.names)
            message = f"the model {name[:100]!r} does not exist: there is {named}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def new_seed(self) -> int:
        """For a request that names none."""
        return self._random.getrandbits(63)

    async def submit(
        self,
        make_prompts: Callable[[], list[list[int]]],
        *,
        prompts: int,
        choices: int,
        max_new_tokens: int | None,
        sampling: Sampling,
        cache_salt: str,
    ) -> Job:
        """The job of a request; a caller that goes away takes it along.

        make_prompts: called in a thread, where what is to be tokenized is; of `prompts` prompts.
        max_new_tokens: None for all that there is room for. Raises ApiError.
        """
        job = self._reserve(choices, prompts * choices)

        def work() -> Exception | None:
            try:
                job.prompts = make_prompts()
                room = [self.engine.max_context - len(prompt) for prompt in job.prompts]
                most = room if max_new_tokens is None else [max_new_tokens] * len(room)
                self.thread.submit(
                    job, max_new_tokens=most, sampling=sampling, cache_salt=cache_salt
                )
            except Exception as error:
                return error
            return None

        future = self.words.start(work)
        try:
            error = await asyncio.shield(future)
        except asyncio.CancelledError:
            # What the thread is at cannot be called off: it is ended when it is there.
            future.add_done_callback(lambda _: self._refused(job))
            raise
        if error is None:
            return job
        self._refused(job)
        if isinstance(error, ApiError):
            raise error
        raise of_engine(error)

    async def occupancy(self) -> Occupancy:
        """What the engine held a moment ago; older where a step takes long."""
        now = time.monotonic()
        if self._seen is not None and (now - self._seen[0] < _FRESH_S or not self.thread.alive):
            return self._seen[1]
        if self._looking is None or self._looking.done():
            future = asyncio.wrap_future(self.thread.call(self.engine.occupancy))
            future.add_done_callback(self._looked)
            self._looking = future
        patience = None if self._seen is None else _PATIENCE_S
        await asyncio.wait({self._looking}, timeout=patience)
        if self._seen is None:
            raise ApiError(503, "the engine does not answer", code="engine_failed")
        return self._seen[1]

    async def drained(self, seconds: float) -> None:
        """Takes no more requests; waits for those that there are, then ends them."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for job in list(self._jobs):
                job.cancel()
            await asyncio.wait({asyncio.ensure_future(self._idle.wait())}, timeout=_PATIENCE_S)
            # An engine that is in the middle of something long is not waited for.
            for job in self._jobs:
                for index in set(range(len(job.streams))) - job.ended:
                    job.arrivals.put_nowait(Update(index, "", [], ShuttingDown()))

    def _reserve(self, choices: int, count: int) -> Job:
        """A job with places for `count` choices. Raises ApiError where there are none."""
        if self.draining:
            raise draining()
        if not self.thread.alive:
            raise ApiError(503, "the engine has ended", code="engine_failed", retry_after=30)
        if count > self.most:
            message = f"{count} choices in one request are more than the {self.most} that may wait"
            raise ApiError(400, message, param="n", code="invalid_value")
        if self._held + count > self.most:
            wait = self._mean_s * self.settings.max_waiting / self.engine.max_requests / 2
            raise ApiError(
                429,
                f"{self._held} choices run or wait, and {self.most} may: ask again later",
                code="rate_limit_exceeded",
                retry_after=min(60, max(1, math.ceil(wait))),
            )
        job = Job(choices=choices, places=count)
        self._held += count
        self._jobs.add(job)
        self._idle.clear()
        return job

    def _refused(self, job: Job) -> None:
        """Gives back the places of what was not submitted; the others end soon."""
        self._give_back(job, job.places - len(job.streams) + len(job.ended))
        job.cancel()

    def _give_back(self, job: Job, count: int) -> None:
        job.places -= count
        self._held -= count
        if not job.places:
            self._jobs.discard(job)
        if not self._held:
            self._idle.set()

    def _arrived(self, job: Job, update: Update) -> None:
        """With each update, on the event loop."""
        now = time.perf_counter()
        self.metrics.arrived(job, update, now)
        if update.end is not None:
            self._mean_s += 0.1 * (now - job.arrived - self._mean_s)
            job.ended.add(update.choice)
            self._give_back(job, 1)

    def _looked(self, done: asyncio.Future[Occupancy]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._seen = (time.monotonic(), done.result())
