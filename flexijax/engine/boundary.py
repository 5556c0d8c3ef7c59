"""What the scheduler is told at a boundary and what it answers, as plain values.

Every `boundary_steps` decode steps the engine stops and calls

    plan = schedule(State(requests, now=time.monotonic(), readings=1), limits)  # scheduler.py
    requests = apply(plan, requests, pool, limits)

and then runs what the plan says until the next boundary.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping

from flexijax.cache.prefix import PrefixIndex


class Stage(enum.Enum):
    """Where a request stands. The engine sets RUNNING when a prompt has been read, and ENDED."""

    WAITING = "waiting"
    READING = "reading"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class Reason(enum.Enum):
    """Why a request lets go of what it has."""

    ENDED = "ended"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is. blocks: of the pools. rows: of the batch. page_size: tokens of a block.

    boundary_steps: decode steps from one boundary to the next. max_passes: how often later requests
    may begin before one that is held up.
    """

    blocks: int
    rows: int
    page_size: int
    boundary_steps: int = 4
    max_passes: int = 8

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.page_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestState:
    """One request. tokens: that its blocks hold when the coming steps begin, at most.

    arrival: its place in the order of submission. cached: while it waits, the blocks that
    `PrefixIndex.match` finds for its prompt now. blocks: what it holds, in order; others may hold
    the first of them too. passed: see `Limits.max_passes`. deadline: seconds, as `State.now`.
    """

    key: int
    arrival: int
    prompt_tokens: int
    max_new_tokens: int
    stage: Stage = Stage.WAITING
    row: int | None = None
    tokens: int = 0
    cached: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()
    passed: int = 0
    cancelled: bool = False
    deadline: float | None = None

    @property
    def total_tokens(self) -> int:
        """The most it may come to hold."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def admitted(self) -> bool:
        """Whether it has a row and blocks, and may ask for more blocks."""
        return self.stage in (Stage.READING, Stage.RUNNING, Stage.PAUSED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """All requests that have not been let go of, in any order. now: seconds, monotonic.

    readings: prompts whose reading may begin; 0 while one is being read, else usually 1.
    """

    requests: tuple[RequestState, ...]
    now: float
    readings: int = 1


@dataclasses.dataclass(frozen=True)
class Admission:
    """A request gets a row, shares the cached blocks and takes so many new ones; read it next."""

    key: int
    row: int
    cached: tuple[int, ...]
    new_blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoundaryPlan:
    """What happens at a boundary, in this order, and until the next one. Requests by their keys.

    release: give rows and blocks back, and why. refuse: those that can never fit, and the
    arithmetic. admit: in the order in which their prompts are read. grow: blocks that rows get for
    the coming steps. pause, resume: rows that stop and go on. decode: all rows that run in the
    coming steps. passed: new counts of those that later ones passed. prefill_share: of the time
    until the next boundary, 0 to 1, for reading prompts.
    """

    release: Mapping[int, Reason]
    refuse: Mapping[int, str]
    admit: tuple[Admission, ...]
    grow: Mapping[int, int]
    pause: tuple[int, ...]
    resume: tuple[int, ...]
    decode: tuple[int, ...]
    passed: Mapping[int, int]
    prefill_share: float


def apply(
    plan: BoundaryPlan, requests: Iterable[RequestState], pool: PrefixIndex, limits: Limits
) -> tuple[RequestState, ...]:
    """Moves blocks as planned; the requests as they stand then, without those let go of.

    pool: of `limits.blocks` blocks, which nobody else has used since `RequestState.cached` was
    asked for. Raises ValueError where the plan is not of this pool.
    """
    left = {request.key: request for request in requests}
    for key in plan.release:
        pool.release(list(left.pop(key).blocks))
    for key in plan.refuse:
        del left[key]
    # Before anything is allocated, which might evict what is about to be shared.
    for admission in plan.admit:
        pool.acquire(list(admission.cached), left[admission.key].prompt_tokens)
    for admission in plan.admit:
        left[admission.key] = dataclasses.replace(
            left[admission.key],
            stage=Stage.READING,
            row=admission.row,
            tokens=len(admission.cached) * limits.page_size,
            cached=(),
            blocks=admission.cached + tuple(pool.allocate(admission.new_blocks)),
        )
    for key, count in plan.grow.items():
        blocks = left[key].blocks + tuple(pool.allocate(count))
        left[key] = dataclasses.replace(left[key], blocks=blocks)
    for keys, stage in ((plan.pause, Stage.PAUSED), (plan.resume, Stage.RUNNING)):
        for key in keys:
            left[key] = dataclasses.replace(left[key], stage=stage)
    for key, passed in plan.passed.items():
        left[key] = dataclasses.replace(left[key], passed=passed)
    return tuple(left.values())
