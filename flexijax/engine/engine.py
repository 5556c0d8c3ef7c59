"""The engine: requests come and go while others run, in the memory that was given to it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

from jax.sharding import Mesh

from flexijax.config import CacheConfig
from flexijax.engine.core import EngineCore
from flexijax.engine.entry import Entry, new_entry
from flexijax.engine.measured import Answering, EngineTotals
from flexijax.engine.mesh import check_mesh, model_of
from flexijax.engine.occupancy import Occupancy, occupancy
from flexijax.engine.plan import find_profile, origin_of
from flexijax.engine.plan_engine import check_there_is, sized_program
from flexijax.engine.program import BOUNDARY_STEPS, Progress
from flexijax.engine.requests import check_cache, check_callable, check_int, make_requests
from flexijax.engine.sampling import Sampling
from flexijax.engine.stream import Stream
from flexijax.models.language_model import LanguageModel


class Engine:
    """Generates for many requests at once, of which new ones may come at any time.

        engine = flexijax.Engine(lm, max_requests=8, max_context=8192, device_bytes="1GiB")
        streams = [engine.submit(prompt, max_new_tokens=256) for prompt in prompts]
        for piece in streams[0]:          # drives all of them
            print(piece, end="")
        streams[1].result().metrics

    Every few decode steps, at a boundary, requests that came are admitted where their memory is
    free, rows get the blocks of their next tokens, and part of a waiting prompt is read; see
    `scheduler.py` for the rules. Nothing that runs is ever preempted or computed again. Programs
    are compiled once, for the sizes of the engine, and its arrays are made once.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        cache: CacheConfig | None = None,
        max_requests: int = 8,
        max_context: int | None = None,
        usual_context: int | None = None,
        device_bytes: int | str | None = None,
        host_bytes: int | str | None = None,
        prefix_caching: bool = True,
        prefill_first: bool = False,
        progress: Progress | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Counts what fits; arrays are made when the first request comes.

        cache: default `CacheConfig()`; its profile is looked up, not measured. max_requests: rows,
        requests that run at once. max_context: tokens of the longest request, new ones included;
        None: all that the model can read. usual_context: of an ordinary one, by which rows are
        weighed against blocks; None: max_context. device_bytes, host_bytes: for everything that the
        engine holds beside the model's weights, a number or a text such as "1GiB"; None: what
        `max_requests` requests of `max_context` tokens take. prefix_caching: whether prompts that
        begin alike share what they begin with. prefill_first: whether everybody waits while a
        prompt is read, which makes the most tokens a second of prompts that are all there and the
        longest gaps; else reading takes at most half of the time while anything decodes. progress:
        called with (stage, done, total). mesh: of one axis, over whose devices the KV heads and the
        weights are divided; device_bytes and host_bytes are of each device then.
        Raises ValueError naming the argument, with the arithmetic where not even one request fits.
        """
        cache = CacheConfig() if cache is None else cache
        check_cache(lm, cache)
        check_callable("progress", progress)
        mesh = check_mesh(lm, mesh)
        max_requests = check_int("max_requests", max_requests, minimum=1)
        if max_context is None:
            max_context = lm.max_context
        max_context = check_int("max_context", max_context, minimum=2)
        if usual_context is not None:
            usual_context = check_int("usual_context", usual_context, minimum=2)
        if max_context > lm.max_context:
            raise ValueError(
                f"max_context={max_context} is more than the {lm.max_context} tokens that "
                f"{lm.name} can read"
            )
        profile = origin = None
        if cache.find_policy().needs_profile:
            profile = find_profile(lm, cache)
            origin = origin_of(cache.profile, profile)
            cache = dataclasses.replace(cache, profile=profile)
        program, sizes = sized_program(
            lm,
            cache,
            max_context=max_context,
            max_requests=max_requests,
            usual_context=usual_context,
            device_bytes=device_bytes,
            host_bytes=host_bytes,
            boundary_steps=BOUNDARY_STEPS,
            mesh=mesh,
        )
        check_there_is(lm, program, sizes)
        answering = Answering(cache, profile, origin)
        self._core = EngineCore(
            model_of(lm, program),
            program,
            answering,
            progress=progress,
            prefix_caching=prefix_caching,
            prefill_first=prefill_first,
        )
        self._numbers = itertools.count()
        # Whoever drives the engine holds the first; the second guards what others change meanwhile.
        self._driving, self._changing = threading.RLock(), threading.Lock()
        self._submitted: list[Entry] = []
        self._cancelled: set[int] = set()
        self.max_context = max_context

    def compile(self, sampling: Sampling | None = None) -> int:
        """Compiles everything now, so that no request waits for it; how many programs that took.

        sampling: the most that requests will ask for; None: greedy tokens. Without this call, each
        program is compiled when the first request needs it.
        """
        with self._driving:
            return self._core.compile(Sampling() if sampling is None else sampling)

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        timeout_s: float | None = None,
        cache_salt: str = "",
    ) -> Stream:
        """A request; it runs while somebody waits for a piece of it or of another.

        prompt: a text, or token ids. timeout_s: seconds from now after which it ends with what it
        has, finish_reason "deadline". cache_salt: the request shares the beginning of its prompt
        with those of the same salt alone.
        Raises ValueError naming the argument, for what `generate` refuses too, and with the
        arithmetic for what could never fit.
        """
        [stream] = self.submit_choices(
            prompt,
            n=1,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            timeout_s=timeout_s,
            cache_salt=cache_salt,
        )
        return stream

    def submit_choices(
        self,
        prompt: str | Sequence[int],
        *,
        n: int,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        timeout_s: float | None = None,
        cache_salt: str = "",
    ) -> list[Stream]:
        """`n` answers to one prompt, each a request with samples of its own.

        They are those of `generate([prompt] * n, sampling=sampling)`, the first that of `submit`.
        Where prompts share what they begin with, the whole chunks of this one are read once; where
        they do not, it is read for each. Other arguments and errors as of `submit`.
        """
        n = check_int("n", n, minimum=1)
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r} must be a positive number of seconds")
        core, prompts = self._core, cast(list[str], [prompt] * n)
        requests = make_requests(core.lm, prompts, max_new_tokens, sampling)
        one = requests[0]
        total = len(one.tokens) + one.max_new_tokens
        if total > self.max_context:
            raise ValueError(
                f"the prompt has {len(one.tokens)} tokens, and max_new_tokens="
                f"{one.max_new_tokens} more would pass max_context={self.max_context} of this "
                "engine"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        entries = []
        for request in requests:
            key = next(self._numbers)
            stream = Stream(self._wait, functools.partial(self._cancel, key))
            entry = new_entry(
                core.lm, core.limits, request, stream, key=key, label="a prompt", now=core.clock()
            )
            entry.salt = cache_salt
            entry.state = dataclasses.replace(entry.state, deadline=deadline)
            entries.append(entry)
        with self._changing:
            self._submitted.extend(entries)
        return [entry.stream for entry in entries]

    def step(self) -> bool:
        """From one boundary to the next; whether anything is left to do."""
        with self._driving:
            self._take_changes()
            left = self._core.step()
            return left or bool(self._submitted)

    def occupancy(self) -> Occupancy:
        """What it holds and what has moved, at a boundary; waits for the next one."""
        with self._driving:
            return occupancy(self._core, len(self._submitted))

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return self._core.compile_s

    @property
    def totals(self) -> EngineTotals:
        """What all requests so far took together; goes on changing."""
        return self._core.totals

    @property
    def boundary_steps(self) -> int:
        """Decode steps from one boundary to the next: as many tokens of a request come at once."""
        return self._core.limits.boundary_steps

    @property
    def num_running(self) -> int:
        """Requests that hold a row."""
        return sum(entry.state.admitted for entry in self._core.entries.values())

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no request holds, of `num_blocks`."""
        return self._core.pool.num_free

    @property
    def max_requests(self) -> int:
        """Rows: requests that may run at once; fewer than asked for where memory is short."""
        return self._core.limits.rows

    @property
    def num_blocks(self) -> int:
        """Blocks of the pools, each of `page_size` tokens."""
        return self._core.limits.blocks

    def _wait(self, waits: Callable[[], bool]) -> None:
        """Drives the engine for as long as somebody waits."""
        while waits():
            with self._driving:
                # Whoever drove it meanwhile may have brought what is waited for.
                if waits() and not self.step() and waits():
                    raise RuntimeError("the engine does not know this request any more")

    def _cancel(self, key: int) -> None:
        with self._changing:
            self._cancelled.add(key)

    def _take_changes(self) -> None:
        with self._changing:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, set()
        for entry in submitted:
            self._core.add(entry)
        for key in cancelled:
            self._core.cancel(key)
