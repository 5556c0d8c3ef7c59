"""A boundary's plan as one array of a fixed size: what process 0 tells the others of a mesh.

All processes have the same requests, since each was asked for the same in the same order, and the
same blocks of them. What depends on time is decided by one: who is let go of, who comes in, which
rows get blocks and go on, and how many pieces of a prompt are read before the next boundary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flexijax.engine.boundary import Admission, BoundaryPlan, Limits, Reason, RequestState
from flexijax.engine.scheduler import why_refused

_REASONS = tuple(Reason)
# Of requests that wait, how many are let go of or refused at one boundary; others at the next.
_LET_GO = 16
_SHARES = 1 << 20  # parts of one


def array_size(limits: Limits) -> int:
    """Numbers in the array of a plan, whatever the plan."""
    return sum(1 + width * most for width, most in _sections(limits)) + 2


def to_array(plan: BoundaryPlan, pieces: int, limits: Limits) -> np.ndarray:
    """int32[array_size]; pieces: of a prompt, to be read before the next boundary."""
    admit = [(of.key, of.row, len(of.cached), of.new_blocks) for of in plan.admit]
    rows = [
        [(key, _REASONS.index(reason)) for key, reason in plan.release.items()],
        [(key,) for key in plan.refuse],
        admit,
        list(plan.grow.items()),
        [(key,) for key in plan.pause],
        [(key,) for key in plan.resume],
        [(key,) for key in plan.decode],
        list(plan.passed.items()),
    ]
    numbers: list[int] = []
    for entries, (width, most) in zip(rows, _sections(limits), strict=True):
        flat = [number for entry in entries for number in entry]
        assert len(entries) <= most, f"{len(entries)} entries of a plan, room for {most}"
        numbers += [len(entries), *flat, *[0] * (width * most - len(flat))]
    return np.array([*numbers, round(plan.prefill_share * _SHARES), pieces], np.int32)


def short_enough(plan: BoundaryPlan, requests: Iterable[RequestState]) -> BoundaryPlan:
    """The plan with no more let go of than there is room for; those left are at the next boundary.

    Only requests that wait are left: of those that hold something all are let go of.
    """
    holding = {request.key for request in requests if request.admitted}
    release = {key: reason for key, reason in plan.release.items() if key in holding}
    others = [item for item in plan.release.items() if item[0] not in holding]
    return dataclasses.replace(
        plan,
        release={**release, **dict(others[:_LET_GO])},
        refuse=dict(list(plan.refuse.items())[:_LET_GO]),
    )


def from_array(
    array: np.ndarray, requests: Mapping[int, RequestState], limits: Limits
) -> tuple[BoundaryPlan, int]:
    """The plan and the pieces of `to_array`; requests: by key, as this process has them.

    Raises ValueError where they are not those of the process that made the plan.
    """
    numbers, at, found = [int(number) for number in array], 0, []
    for width, most in _sections(limits):
        count, flat = numbers[at], numbers[at + 1 : at + 1 + width * numbers[at]]
        found.append([tuple(flat[of : of + width]) for of in range(0, width * count, width)])
        at += 1 + width * most
    release, refuse, admit, grow, pause, resume, decode, passed = found
    named = [entry[0] for section in found for entry in section]
    if unknown := [key for key in named if key not in requests]:
        raise ValueError(
            f"process 0 plans for requests {unknown}, which were not submitted here: over several "
            "processes each must submit the same requests in the same order"
        )
    admissions = []
    for key, row, cached, new_blocks in admit:
        if len(requests[key].cached) != cached:
            raise ValueError(f"request {key} begins like another prompt in process 0 alone")
        admissions.append(Admission(key, row, requests[key].cached, new_blocks))
    share, pieces = numbers[at], numbers[at + 1]
    plan = BoundaryPlan(
        release={key: _REASONS[reason] for key, reason in release},
        refuse={key: why_refused(requests[key], limits) or "" for (key,) in refuse},
        admit=tuple(admissions),
        grow=dict(grow),
        pause=_keys(pause),
        resume=_keys(resume),
        decode=_keys(decode),
        passed=dict(passed),
        prefill_share=share / _SHARES,
    )
    return plan, pieces


def _keys(entries: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(key for (key,) in entries)


def _sections(limits: Limits) -> tuple[tuple[int, int], ...]:
    """(numbers of an entry, most entries): of release, refuse, admit, grow, pause and so on."""
    rows = limits.rows
    waiting = limits.max_passes + 1
    return (
        (2, rows + _LET_GO),
        (1, _LET_GO),
        (4, 1),
        (2, rows),
        (1, rows),
        (1, rows),
        (1, rows),
        (2, rows + waiting),
    )
