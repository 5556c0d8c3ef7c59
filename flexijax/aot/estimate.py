"""An estimated time of a program, from its launches, bytes and instructions, and every assumption.

Nothing here was measured or fitted: no GPU was at hand. The constants are middles of public ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from flexijax.aot import launches
from flexijax.aot.disassembly import KernelReport
from flexijax.aot.launches import Counts, Event
from flexijax.aot.targets import Target
from flexijax.aot.thunks import Thunk
from flexijax.aot.traffic import Module

# From the end of a kernel to the start of one that waits for it, in one CUDA graph: public figures
# lie between 1.0 and 1.5 microseconds.
GRAPH_NODE_SECONDS = 1.25e-6
# A launch by itself, or of a whole graph, from the host: 2 to 4 microseconds. Launches may run
# ahead of the device; here they never do.
LAUNCH_SECONDS = 3e-6
# A predicate copied to the host, and the host waiting for the stream: 10 to 20 microseconds.
HOST_SYNC_SECONDS = 15e-6
# Of the peak that a stream through device memory reaches: 0.85 to 0.9. Taken for matrix products
# of 16 rows too, which read their weights once.
DRAM_EFFICIENCY = 0.875
# Of the full rate of issue, one instruction a cycle and scheduler. There is no public figure for
# such kernels: dependent instructions and barriers leave schedulers idle.
ISSUE_EFFICIENCY = 0.7
SCHEDULERS = 4  # of a multiprocessor, since Volta


@dataclass(frozen=True)
class KernelTime:
    """One of our kernels at the peaks: all its launches together.

    exact: False where its instructions are at least so many. nbytes: without what a page mover
    carries, which depends on the text.
    """

    name: str
    launches: float
    nbytes: float
    byte_seconds: float
    issue_seconds: float
    exact: bool

    def times(self, number: float) -> KernelTime:
        """Of so many times the launches."""
        return KernelTime(
            name=self.name,
            launches=number * self.launches,
            nbytes=number * self.nbytes,
            byte_seconds=number * self.byte_seconds,
            issue_seconds=number * self.issue_seconds,
            exact=self.exact,
        )


@dataclass(frozen=True)
class Estimate:
    """Seconds by what takes them; kernels: ours, whose time is within `work`.

    work: of each launch the longer of bytes over bandwidth and, for our kernels, instructions over
    the rate of issue, each over its efficiency. Other kernels' instructions are not looked at.
    """

    work: float = 0.0
    graph_nodes: float = 0.0
    outside: float = 0.0
    host_syncs: float = 0.0
    kernels: tuple[KernelTime, ...] = ()

    @property
    def seconds(self) -> float:
        """In all."""
        return self.work + self.graph_nodes + self.outside + self.host_syncs

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            work=self.work + other.work,
            graph_nodes=self.graph_nodes + other.graph_nodes,
            outside=self.outside + other.outside,
            host_syncs=self.host_syncs + other.host_syncs,
            kernels=_merged([*self.kernels, *other.kernels]),
        )

    def times(self, number: float) -> Estimate:
        """Of so many calls of the program."""
        return Estimate(
            work=number * self.work,
            graph_nodes=number * self.graph_nodes,
            outside=number * self.outside,
            host_syncs=number * self.host_syncs,
            kernels=tuple(kernel.times(number) for kernel in self.kernels),
        )


def estimate(
    thunks: Iterable[Thunk],
    hlo: str,
    kernels: Iterable[KernelReport],
    *,
    target: Target,
    page_size: int,
) -> Estimate:
    """The time of one trip of a program's outermost loops, or where it has none of one call.

    kernels: those that are ours. page_size: tokens of the pages that a kernel finds by their ids.
    """
    trips = launches.trip_counts(hlo)
    once, loops = launches.split(thunks)
    counts = launches.launches(thunks, trips)
    if loops:
        found = [event for loop, held in loops for event in launches.trip(loop, trips, held)]
        return _estimate(found, counts.step, Module(hlo, page_size), kernels, target)
    found = list(launches.events(once, trips))
    return _estimate(found, counts.once, Module(hlo, page_size), kernels, target)


def issue_seconds(kernel: KernelReport, target: Target) -> float:
    """The least time of one launch by its instructions: every scheduler issues one a cycle."""
    warps = math.prod(kernel.grid) * -(-kernel.threads // 32)
    per_second = target.cores * SCHEDULERS * target.clock_ghz * 1e9
    return warps * kernel.issued / per_second


def _estimate(
    found: Iterable[Event],
    counts: Counts,
    module: Module,
    kernels: Iterable[KernelReport],
    target: Target,
) -> Estimate:
    ours = {name: kernel for kernel in kernels for name in kernel.names}
    work, times = 0.0, []
    for event in found:
        if not event.is_launch:
            continue
        nbytes = module.nbytes(event.thunk.instruction)
        by_bytes = nbytes / target.device_bytes_per_second
        by_issue = 0.0
        if kernel := ours.get(event.thunk.kernel):
            by_issue = issue_seconds(kernel, target)
            one = KernelTime(kernel.stem, 1, nbytes, by_bytes, by_issue, kernel.issued_exact)
            times += [one] * event.times
        work += event.times * max(by_bytes / DRAM_EFFICIENCY, by_issue / ISSUE_EFFICIENCY)
    return Estimate(
        work=work,
        graph_nodes=counts.in_graphs * GRAPH_NODE_SECONDS,
        outside=(counts.outside + counts.graphs) * LAUNCH_SECONDS,
        host_syncs=counts.host_syncs * HOST_SYNC_SECONDS,
        kernels=_merged(times),
    )


def _merged(found: Iterable[KernelTime]) -> tuple[KernelTime, ...]:
    """One of each name."""
    named: dict[str, list[KernelTime]] = {}
    for one in found:
        named.setdefault(one.name, []).append(one)
    return tuple(
        KernelTime(
            name=name,
            launches=sum(one.launches for one in all_of),
            nbytes=sum(one.nbytes for one in all_of),
            byte_seconds=sum(one.byte_seconds for one in all_of),
            issue_seconds=sum(one.issue_seconds for one in all_of),
            exact=all(one.exact for one in all_of),
        )
        for name, all_of in named.items()
    )
