"""A boundary's plan, from the requests of an engine."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flexijax.engine.boundary import BoundaryPlan, Limits, State
from flexijax.engine.entry import Entry
from flexijax.engine.processes import Processes
from flexijax.engine.scheduler import schedule
from flexijax.engine.shared_prefixes import SharedPrefixes


class Planner:
    """processes: where several run the same programs, which all do what the first one plans."""

    def __init__(
        self, limits: Limits, prefixes: SharedPrefixes, processes: Processes | None
    ) -> None:
        self._limits, self._prefixes, self._processes = limits, prefixes, processes

    def plan(self, entries: Mapping[int, Entry], *, reading: bool) -> BoundaryPlan:
        """What `schedule` plans; nothing but what is known of prefixes changes.

        entries: by key. reading: whether a prompt is being read.
        """
        if not reading:
            self._prefixes.look_up(entries.values(), self._limits)
        states = {key: entry.state for key, entry in entries.items()}
        state = State(
            requests=tuple(states.values()), now=time.monotonic(), readings=0 if reading else 1
        )
        plan = schedule(state, self._limits)
        return plan if self._processes is None else self._processes.agreed(plan, states)
