"""What XLA's runtime carries out, from the listing in its dump: one line a thunk, indented.

A thunk is a kernel, a copy, a call of a library, or holds others: a command buffer (a CUDA graph),
a loop, a conditional.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LINE = re.compile(r"^( *)(\d+): (k\w+)\s*(?:\[[^\]]*\])?\s*(.*?)\s*$")
_LABEL = re.compile(r"^( *)(condition|body|\w+_branch|branch_\d+):\s*$")
_KERNEL = re.compile(
    r"^(\S+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+), (\d+), (\d+)\]"
    r"\s+shared_memory: (\d+) bytes"
)
_METADATA = re.compile(r'profile_annotation: "([^"]*)"\s+thunk_id: (\d+)')


@dataclass(frozen=True)
class Thunk:
    """One line of the listing.

    kind: as XLA says it ("kCustomKernel", "kWhile"). kernel: the function that is launched, "" for
    what is no kernel; grid in blocks, threads and shared_bytes of a block. instruction: of the
    final HLO, "" where XLA does not say. parts: the thunks inside by what they are to it: "body"
    and "condition" of a loop, each branch of a conditional, "" otherwise.
    """

    number: int
    kind: str
    kernel: str = ""
    grid: tuple[int, int, int] = (1, 1, 1)
    threads: int = 0
    shared_bytes: int = 0
    instruction: str = ""
    parts: Mapping[str, tuple[Thunk, ...]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Thunk]:
        """This one and all inside it."""
        yield self
        for part in self.parts.values():
            for thunk in part:
                yield from thunk


def read(dump: Path) -> tuple[Thunk, ...]:
    """The thunks of the program in the folder given to `xla_dump_to`.

    RuntimeError where there is no listing: a later XLA may name the file differently.
    """
    # Where no command buffer was formed, only the listing before those passes is written.
    for name in ("*thunk_sequence_after_thunk_passes*.txt", "*thunk_sequence*.txt"):
        if found := sorted(dump.glob(name)):
            metadata = "\n".join(path.read_text() for path in dump.glob("*thunk_metadata*.txt"))
            return parse(found[-1].read_text(), metadata)
    raise RuntimeError(f"XLA wrote no *thunk_sequence*.txt into {dump}")


def parse(listing: str, metadata: str = "") -> tuple[Thunk, ...]:
    """The thunks of a listing; metadata: the text that names the HLO instruction of each number."""
    instructions = {int(number): name for name, number in _METADATA.findall(metadata)}
    root = _Open(indent=-1, line=None)
    stack = [root]
    for text in listing.splitlines():
        if label := _LABEL.match(text):
            # "condition:" stands at the margin, whatever loop it is of: of the line before.
            while label[2] != "condition" and stack[-1].indent >= len(label[1]):
                stack.pop()
            stack[-1].label = label[2]
        elif line := _LINE.match(text):
            while stack[-1].indent >= len(line[1]):
                stack.pop()
            opened = _Open(indent=len(line[1]), line=line)
            stack[-1].parts.setdefault(stack[-1].label, []).append(opened)
            stack.append(opened)
    return tuple(_closed(inner, instructions) for inner in root.parts.get("", []))


@dataclass
class _Open:
    """A thunk whose inner lines are still to come; label: of the part that they belong to."""

    indent: int
    line: re.Match[str] | None
    label: str = ""
    parts: dict[str, list[_Open]] = field(default_factory=dict)


def _closed(opened: _Open, instructions: Mapping[int, str]) -> Thunk:
    assert opened.line is not None
    number, kind, rest = int(opened.line[2]), opened.line[3], opened.line[4]
    parts = {
        label: tuple(_closed(inner, instructions) for inner in found)
        for label, found in opened.parts.items()
    }
    # Command buffers are all numbered 0, which is nobody's number in the metadata.
    instruction = instructions.get(number, "") if number else ""
    if kernel := _KERNEL.match(rest):
        x, y, z, *block, shared = map(int, kernel.groups()[1:])
        threads = block[0] * block[1] * block[2]
        return Thunk(number, kind, kernel[1], (x, y, z), threads, shared, instruction, parts)
    return Thunk(number, kind, instruction=instruction, parts=parts)
