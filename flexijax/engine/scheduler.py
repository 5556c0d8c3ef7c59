"""What happens at a boundary: a pure function of plain state to a plan, see boundary.py.

The rules, in the order in which they are applied.

1.  What has ended, was cancelled or has passed its deadline gives its row and blocks back.
2.  What cannot fit into all blocks is refused, with the arithmetic.
3.  Rows that decode get the blocks that the coming steps will fill, the oldest first. One that
    cannot have them pauses with all that it holds, and goes on when it can. Nothing is preempted or
    computed again: what was generated came from sparse attention, and would come out differently.
4.  Waiting requests are admitted in order of arrival. An admission takes a row and the prompt's
    blocks, except those that are cached; later ones are granted by rule 3.
5.  Who is held up, waiting or paused, is passed by at most `max_passes` later admissions. After
    that none is admitted, so what runs ends and its blocks come free.
6.  Every grant of rules 3 and 4 leaves a safe state, see safety.py: so at each boundary some row
    can go on, and all that were admitted end.
7.  Prompts are read for half of the time while anything decodes, else all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexijax.engine.boundary import (
    Admission,
    BoundaryPlan,
    Limits,
    Reason,
    RequestState,
    Stage,
    State,
)
from flexijax.engine.safety import BlockLedger

# Of the time between boundaries, while rows decode.
MAX_PREFILL_SHARE = 0.5


def schedule(state: State, limits: Limits) -> BoundaryPlan:
    """The plan of one boundary; nothing is changed.

    The waiting requests that it looks at are the first `max_passes` + 1, so only those need to know
    what is `cached`.
    """
    in_order = sorted(state.requests, key=lambda request: request.arrival)
    release = {r.key: reason for r in in_order if (reason := _why_release(r, state.now))}
    kept = [request for request in in_order if request.key not in release]
    waiting = [request for request in kept if request.stage is Stage.WAITING]
    refuse = {r.key: message for r in waiting if (message := why_refused(r, limits))}
    first = [r for r in waiting if r.key not in refuse][: limits.max_passes + 1]
    admitted = [request for request in kept if request.admitted]

    ledger = BlockLedger(limits, admitted, first)
    grow, decode, paused = _grow(admitted, limits, ledger)
    rows = sorted(set(range(limits.rows)) - {request.row for request in admitted})
    admit, passed = _admit(first, paused, rows[: state.readings], limits, ledger)

    reading = bool(admit) or any(request.stage is Stage.READING for request in admitted)
    share = MAX_PREFILL_SHARE if decode else 1.0
    return BoundaryPlan(
        release=release,
        refuse=refuse,
        admit=admit,
        grow=grow,
        pause=tuple(r.key for r in paused if r.stage is Stage.RUNNING),
        resume=tuple(r.key for r in decode if r.stage is Stage.PAUSED),
        decode=tuple(request.key for request in decode),
        passed=passed,
        prefill_share=share if reading else 0.0,
    )


def why_refused(request: RequestState, limits: Limits) -> str | None:
    """Why a request can never be admitted, with the arithmetic; None where it can."""
    needed = limits.blocks_for(request.total_tokens)
    if needed <= limits.blocks:
        return None
    return (
        f"{request.prompt_tokens} tokens and max_new_tokens={request.max_new_tokens} more need "
        f"{needed} blocks of {limits.page_size} tokens, and there are {limits.blocks}: shorten "
        "either, or raise device_bytes and host_bytes"
    )


def _why_release(request: RequestState, now: float) -> Reason | None:
    if request.stage is Stage.ENDED:
        return Reason.ENDED
    if request.cancelled:
        return Reason.CANCELLED
    if request.deadline is not None and request.deadline <= now:
        return Reason.DEADLINE
    return None


def _grow(
    admitted: Sequence[RequestState], limits: Limits, ledger: BlockLedger
) -> tuple[dict[int, int], list[RequestState], list[RequestState]]:
    """Blocks by key, the requests that decode, and those that cannot."""
    grow, decode, paused = {}, [], []
    for request in admitted:
        if request.stage is Stage.READING:
            continue
        tokens = min(request.tokens + limits.boundary_steps, request.total_tokens)
        count = max(0, limits.blocks_for(tokens) - len(request.blocks))
        if not ledger.grow(request.key, count):
            paused.append(request)
            continue
        decode.append(request)
        if count:
            grow[request.key] = count
    return grow, decode, paused


def _admit(
    waiting: Sequence[RequestState],
    paused: Sequence[RequestState],
    rows: Sequence[int],
    limits: Limits,
    ledger: BlockLedger,
) -> tuple[tuple[Admission, ...], dict[int, int]]:
    """The admissions into these rows, and how often others were passed by then."""
    admit, held_up, free_rows = [], list(paused), list(rows)
    passed = {request.key: request.passed for request in [*paused, *waiting]}
    for request in waiting:
        earlier = [other.key for other in held_up if other.arrival < request.arrival]
        if not free_rows or any(passed[key] >= limits.max_passes for key in earlier):
            break
        if not ledger.admit(request):
            held_up.append(request)
            continue
        count = limits.blocks_for(request.prompt_tokens) - len(request.cached)
        admit.append(Admission(request.key, free_rows.pop(0), request.cached, count))
        for key in earlier:
            passed[key] += 1
    before = {request.key: request.passed for request in [*paused, *waiting]}
    return tuple(admit), {key: now for key, now in passed.items() if now != before[key]}
