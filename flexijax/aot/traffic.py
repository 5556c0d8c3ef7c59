"""Bytes that an instruction of the final HLO must read and write, from its text.

What is only gathered or sliced from counts as the part that is taken, what is written in place as
the part that is written. What a page mover carries depends on the text that is generated: a kernel
that addresses host memory counts as nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*?^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"calls=%([\w.-]+)")
HOST = "S(5)"  # XLA's number of the memory space
_IN_PLACE = re.compile(r"\{(\d*)\}: \((\d+), \{\}\)")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f16": 16}
_TAKES = ("gather", "dynamic-slice", "slice")
# The operand that holds what these write into their first one.
_WRITES = {"dynamic-update-slice": 1, "scatter": 2}


def array_bytes(dtype: str, dims: str) -> int:
    """Size of an HLO shape such as bf16[16,128]: the digits of the type's name are its bits."""
    bits = _BITS.get(dtype) or int(re.sub(r"\D.*", "", dtype.lstrip("sufc")) or 8)
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8


@dataclass(frozen=True)
class Instruction:
    """made: the text of its shape. rest: what follows the operands."""

    name: str
    made: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @cached_property
    def arrays(self) -> list[int]:
        """Bytes of each array that it makes."""
        return [array_bytes(*found) for found in _ARRAY.findall(self.made)]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(self.arrays)


@dataclass(frozen=True)
class Module:
    """A program's instructions by computation and name."""

    text: str
    page_size: int
    _seen: dict[str, dict[str, Instruction]] = field(default_factory=dict, compare=False)

    @cached_property
    def bodies(self) -> dict[str, str]:
        """The text of each computation."""
        return {found[1]: found[0] for found in _COMPUTATION.finditer(self.text)}

    @cached_property
    def called(self) -> dict[str, Instruction]:
        """Every instruction outside of fusions, as far as names tell."""
        fused = set(_CALLS.findall(self.text))
        outside = [name for name in self.bodies if name not in fused]
        return {name: found for body in outside for name, found in self.inside(body).items()}

    def inside(self, computation: str) -> dict[str, Instruction]:
        """The instructions of one computation."""
        if computation not in self._seen:
            self._seen[computation] = dict(_instructions(self.bodies.get(computation, "")))
        return self._seen[computation]

    def nbytes(self, name: str) -> int:
        """Bytes that the instruction of that name reads and writes; 0 where there is none."""
        if (found := self.called.get(name)) is None:
            return 0
        calls = _CALLS.search(found.rest)
        if found.opcode == "fusion" and calls:
            return _fusion(found, self.called, self.inside(calls[1]))
        operands = [self.called[at] for at in found.operands if at in self.called]
        if any(HOST in array.made for array in (found, *operands)):
            return 0
        if found.opcode == "custom-call":
            return _call(found, self.page_size)
        return found.nbytes + sum(operand.nbytes for operand in operands)


def _instructions(body: str) -> Iterator[tuple[str, Instruction]]:
    for root, name, made, opcode, after in _INSTRUCTION.findall(body):
        operands, _, rest = after.partition(")")
        names = tuple(re.findall(r"%([\w.-]+)", operands))
        if opcode == "parameter":
            rest = operands
        yield name, Instruction(name, made, opcode, names, rest, bool(root))


def _fusion(
    fusion: Instruction, outside: dict[str, Instruction], inside: dict[str, Instruction]
) -> int:
    """What a fusion takes of each operand, and writes of each result."""
    total = 0
    for parameter in inside.values():
        if parameter.opcode != "parameter":
            continue
        operand = outside.get(fusion.operands[int(parameter.rest)])
        whole, taken = operand.nbytes if operand else parameter.nbytes, 0
        for user in _users(parameter.name, inside):
            first = user.operands[0] == parameter.name or user.opcode not in (*_TAKES, *_WRITES)
            if user.opcode in _TAKES and first:
                taken += user.nbytes
            elif not (user.opcode in _WRITES and first):
                taken += whole
        total += min(taken, whole)
    [root] = [found for found in inside.values() if found.is_root]
    results = [inside[at] for at in root.operands] if root.opcode == "tuple" else [root]
    for result in results:
        while result.opcode == "bitcast":
            result = inside[result.operands[0]]
        at = _WRITES.get(result.opcode)
        total += result.nbytes if at is None else inside[result.operands[at]].nbytes
    return total


def _users(name: str, inside: dict[str, Instruction]) -> Iterator[Instruction]:
    """Who reads an array, as it is or seen as another shape."""
    for user in inside.values():
        if name in user.operands:
            if user.opcode == "bitcast":
                for further in _users(user.name, inside):
                    renamed = tuple(name if at == user.name else at for at in further.operands)
                    yield Instruction(
                        further.name, further.made, further.opcode, renamed, further.rest, False
                    )
            else:
                yield user


def _call(call: Instruction, page_size: int) -> int:
    """What a kernel reads and writes; of pools and slots the pages that its lists name.

    In the order of decode attention's operands: keys and values [rows, H], then ids int32[B, K, n].
    Of the sketch encoder's: codes, mean and step [B, K, H], keys, and last the blocks int32[B, E].
    """
    layouts = _ARRAY.findall(call.rest.partition("operand_layout_constraints={")[2].split("}}")[0])
    sizes, made = [array_bytes(*layout) for layout in layouts], list(call.arrays)
    attends = "flexijax_decode" in call.rest
    for output, operand in _IN_PLACE.findall(call.rest):
        made[int(output or 0)] = 0  # written in place: a token's row
        if not attends:
            sizes[int(operand)] = 0
    if "flexijax_sketch_encode" in call.rest:
        entries = math.prod(map(int, layouts[-1][1].split(",")))
        _, heads, width = map(int, layouts[1][1].split(","))
        named = entries * heads * page_size * array_bytes(layouts[3][0], str(width))
        sizes[3] = min(named, sizes[3])
    for at in range(len(layouts) - 1):
        (dtype, dims), after = layouts[at], layouts[at + 1]
        if not attends or dtype == "s32" or after != (dtype, dims) or dims.count(",") != 1:
            continue
        lists = [ids for kind, ids in layouts[at + 2 :] if kind == "s32" and ids.count(",") == 2]
        if lists:
            pages = math.prod(map(int, lists[0].split(",")))
            listed = pages * page_size * array_bytes(dtype, dims.split(",")[1])
            sizes[at] = sizes[at + 1] = min(listed, sizes[at])
    return sum(sizes) + sum(made)
