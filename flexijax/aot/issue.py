"""How many instructions a warp of a kernel issues, from its PTX and its disassembly.

A loop's instructions count as often as it goes round. How often is read in the PTX, where the
compiler's loops have a counter with a constant start, step and end; the assembler leaves a loop as
it is or unrolls all of it. What a branch skips is counted as well.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CODE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^\n]*)", re.M)
_LABEL = re.compile(r"^(\.L_x_\d+):", re.M)
_PTX_LABEL = re.compile(r"^(\$L__BB\w+):", re.M)
_PTX_BRANCH = re.compile(r"^\s*(?:@(!?)(%p\d+) )?bra(?:\.uni)?\s+(\$L__BB\w+);", re.M)


@dataclass(frozen=True)
class Issued:
    """instructions: of one warp. exact: False where a loop's trips are not known: at least."""

    instructions: int
    exact: bool


def issued(sass: str, ptx: str) -> Issued:
    """Counts one kernel: its section of nvdisasm's listing, and its PTX."""
    code = list(_CODE.finditer(sass))
    labels = {label[1]: label.start() for label in _LABEL.finditer(sass)}
    loops = []
    for line in code:
        target = re.search(r"\.L_x_\d+", line[3]) if line[2].startswith("BRA") else None
        start = labels.get(target[0]) if target else None
        # The branch to itself after the last EXIT only fills the page.
        if (
            start is not None
            and start < line.start()
            and sass[start : line.start()].count("\n") > 1
        ):
            loops.append((start, line.start()))
    trips = loop_trips(ptx)
    exact = not loops or (len(trips) == len(loops) and None not in trips)
    total = 0
    for line in code:
        if line[2] == "NOP":
            continue
        times = 1
        for at, (start, end) in enumerate(loops):
            if start < line.start() <= end and len(trips) == len(loops):
                times *= trips[at] or 1
        total += times
    return Issued(total, exact)


def loop_trips(ptx: str) -> list[int | None]:
    """How often each loop goes round, in order of their ends; None where that is not constant."""
    labels = {label[1]: label.start() for label in _PTX_LABEL.finditer(ptx)}
    found = []
    for branch in _PTX_BRANCH.finditer(ptx):
        start = labels[branch[3]]
        if start < branch.start():
            body, before = ptx[start : branch.start()], ptx[:start]
            found.append(_trips(body, before, branch[2]) if branch[2] else None)
    return found


def _trips(body: str, before: str, predicate: str) -> int | None:
    """In data: start 0, `add r26, r630, 64`, `mov r630, r26`, until `setp.ne r26, 320` -> 5."""
    test = re.search(rf"setp\.(ne|lt)\.\w+\s+{predicate}, (%r\d+), (-?\d+);", body)
    if test is None:
        return 2 if _goes_round_twice(body, before, predicate) else None
    kind, counter, end = test.groups()
    step = re.search(rf"add\.s32\s+{counter}, (%r\d+), (-?\d+);", body)
    if step is None:
        return None
    carried, by = step[1], int(step[2])
    if carried != counter and not re.search(rf"mov\.\w+\s+{carried}, {counter};", body):
        return None
    begin = _constant(carried, before)
    if begin is None or by == 0:
        return None
    rounds, left = divmod(int(end) - begin, by)
    if kind == "lt":
        return max(rounds + (left > 0), 1)
    return rounds if rounds > 0 and left == 0 else None


def _goes_round_twice(body: str, before: str, predicate: str) -> bool:
    """A flag that is true at first and false from then on: what is left of a loop of two trips."""
    flag = re.search(rf"mov\.pred\s+{predicate}, (%p\d+);", body)
    if flag is None or _constant(flag[1], before) != -1:
        return False
    later = re.findall(rf"mov\.pred\s+{flag[1]}, ([^;]+);", body)
    return bool(later) and (later[-1] == "0" or _constant(later[-1], before + body) == 0)


def _constant(register: str, before: str) -> int | None:
    """What a register was last set to, if to a constant."""
    moves = re.findall(rf"mov\.\w+\s+{register}, ([^;]+);", before)
    if not moves:
        return None
    return int(moves[-1]) if re.fullmatch(r"-?\d+", moves[-1]) else _constant(moves[-1], before)
