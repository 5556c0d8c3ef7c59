"""How many launches a program takes, in CUDA graphs and outside of them, and what waits for what.

A kernel, a copy, a memset, a call of cuBLAS or cuDNN is one launch each. A conditional, and a loop
whose trips the compiler does not know, copy their predicate to the host and wait for it, unless a
graph holds them. A loop of known trips waits for nothing, and its condition never runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from flexijax.aot.thunks import Thunk

_GRAPH, _LOOP, _CONDITIONAL = "kCommandBuffer", "kWhile", "kConditional"
# What only holds others. The first kind of dynamic slice reads its offsets back.
_HOLDERS = ("kSequential", "kDynamicSliceFusion", "kDynamicSlice", "kAsyncStart")
_WAITS = ("kDynamicSlice", "kInfeed", "kOutfeed", "kHostExecuteDone", "kHostRecvDone")
_NO_LAUNCH = re.compile(r"k\w+Done|kWaitForStreams")
_TRIPS = re.compile(
    r'^\s*(?:ROOT )?%(\S+) = .*? while\(.*"known_trip_count":\{"n":"(\d+)"\}', re.MULTILINE
)


@dataclass(frozen=True)
class Counts:
    """in_graphs, outside: launches. graphs: launches of whole CUDA graphs. unknown_loops: of loops.

    Of a conditional the branch with the most launches is counted, of an unknown loop one trip.
    """

    in_graphs: int = 0
    outside: int = 0
    graphs: int = 0
    conditionals: int = 0
    loops: int = 0
    unknown_loops: int = 0
    host_syncs: int = 0

    @property
    def launches(self) -> int:
        """Of kernels, copies and libraries, in graphs or not."""
        return self.in_graphs + self.outside

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True))
        )

    def times(self, number: int) -> Counts:
        """As often as that."""
        return Counts(*(number * value for value in _values(self)))


@dataclass(frozen=True)
class Loop:
    """An outermost loop: trips, None where the compiler does not know them, and one of them."""

    trips: int | None
    each: Counts


@dataclass(frozen=True)
class Launches:
    """Of a program: once outside of its loops, and its loops."""

    once: Counts = Counts()
    loops: tuple[Loop, ...] = ()

    @property
    def step(self) -> Counts:
        """One trip of every outermost loop: a decode step where the loop is that of R steps."""
        return sum((loop.each for loop in self.loops), Counts())

    @property
    def total(self) -> Counts:
        """All trips, loops themselves included; one trip of a loop that is not known."""
        found = self.once
        for loop in self.loops:
            trips = 1 if loop.trips is None else loop.trips
            itself = Counts(loops=1, unknown_loops=int(loop.trips is None))
            found = found + loop.each.times(trips) + itself
        return found

    def __add__(self, other: Launches) -> Launches:
        return Launches(self.once + other.once, self.loops + other.loops)

    def times(self, number: int) -> Launches:
        """Of so many calls of the program."""
        return Launches(self.once.times(number), self.loops * number)


@dataclass(frozen=True)
class Event:
    """A thunk that is carried out, so many times, in a graph or not."""

    thunk: Thunk
    times: int
    in_graph: bool

    @property
    def is_launch(self) -> bool:
        """Whether it is a launch of its own, rather than what holds some or waits for one."""
        kind = self.thunk.kind
        holds = kind in (_GRAPH, _LOOP, _CONDITIONAL, *_HOLDERS)
        return not holds and not _NO_LAUNCH.fullmatch(kind)


def trip_counts(hlo: str) -> dict[str, int]:
    """The trips of each loop that the compiler knows, by the name of its instruction."""
    return {name: int(trips) for name, trips in _TRIPS.findall(hlo)}


def launches(thunks: Iterable[Thunk], trips: Mapping[str, int]) -> Launches:
    """Counts a program; trips: of the loops, by instruction (`trip_counts`)."""
    once, found = split(thunks)
    loops = []
    for loop, in_graph in found:
        each, known = count(trip(loop, trips, in_graph), trips), trips.get(loop.instruction)
        waits = known is None and not in_graph
        loops.append(Loop(known, each + Counts(host_syncs=int(waits))))
    return Launches(count(events(once, trips), trips), tuple(loops))


def split(thunks: Iterable[Thunk]) -> tuple[list[Thunk], list[tuple[Thunk, bool]]]:
    """The thunks without the outermost loops, and these, with whether a graph holds them."""
    once, loops = [], []
    for thunk in thunks:
        if thunk.kind == _LOOP:
            loops.append((thunk, False))
        elif thunk.kind == _GRAPH and any(inner.kind == _LOOP for inner in thunk):
            outside, inside = split(thunk.parts.get("", ()))
            once.append(Thunk(thunk.number, thunk.kind, parts={"": tuple(outside)}))
            loops += [(loop, True) for loop, _ in inside]
        else:
            once.append(thunk)
    return once, loops


def trip(loop: Thunk, trips: Mapping[str, int], in_graph: bool = False) -> Iterator[Event]:
    """What one trip of a loop carries out."""
    yield from events(loop.parts.get("body", ()), trips, in_graph=in_graph)
    if in_graph or loop.instruction not in trips:
        yield from events(loop.parts.get("condition", ()), trips, in_graph=in_graph)


def events(
    thunks: Iterable[Thunk], trips: Mapping[str, int], *, times: int = 1, in_graph: bool = False
) -> Iterator[Event]:
    """All that is carried out, holders included, in order; loops as often as `trips` says."""
    for thunk in thunks:
        yield Event(thunk, times, in_graph)
        inner = in_graph or thunk.kind == _GRAPH
        if thunk.kind == _LOOP:
            each = list(trip(thunk, trips, in_graph))
            rounds = times * trips.get(thunk.instruction, 1)
            yield from (Event(e.thunk, e.times * rounds, e.in_graph) for e in each)
        elif thunk.kind == _CONDITIONAL:
            branches = [
                list(events(part, trips, times=times, in_graph=inner))
                for part in thunk.parts.values()
            ]
            yield from max(branches, key=_number_of_launches, default=[])
        else:
            for part in thunk.parts.values():
                yield from events(part, trips, times=times, in_graph=inner)


def count(found: Iterable[Event], trips: Mapping[str, int]) -> Counts:
    """The counts of what is carried out."""
    total = Counts()
    for event in found:
        kind, times = event.thunk.kind, event.times
        unknown = kind == _LOOP and event.thunk.instruction not in trips
        waits = unknown or kind in (_CONDITIONAL, *_WAITS)
        total += Counts(
            in_graphs=times * (event.is_launch and event.in_graph),
            outside=times * (event.is_launch and not event.in_graph),
            graphs=times * (kind == _GRAPH),
            conditionals=times * (kind == _CONDITIONAL),
            loops=times * (kind == _LOOP),
            unknown_loops=times * unknown,
            host_syncs=times * (waits and not event.in_graph),
        )
    return total


def _values(counts: Counts) -> list[int]:
    return [getattr(counts, field.name) for field in fields(counts)]


def _number_of_launches(found: list[Event]) -> int:
    return sum(event.times for event in found if event.is_launch)
