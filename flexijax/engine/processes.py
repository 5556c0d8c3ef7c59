"""Several processes over one mesh: process 0 plans every boundary, and tells the others."""

from __future__ import annotations

from collections.abc import Mapping

from flexijax.engine.boundary import BoundaryPlan, Limits, RequestState
from flexijax.engine.plan_array import from_array, short_enough, to_array
from flexijax.pallas_kernels import placing

# Seconds of reading after which others are looked at, where nothing decodes.
READING_S = 0.25


def reading_budget(decoded_s: float, share: float) -> float:
    """Seconds of reading after steps that took `decoded_s`: `share` of both together."""
    return decoded_s * share / (1 - share) if decoded_s else READING_S


class Processes:
    """What the processes of an engine agree on.

    Clocks differ, and every process must run the same programs: so how much of a prompt is read
    before the next boundary is a number of pieces, from what pieces and steps have taken so far.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._piece_s = self._decode_s = 0.0
        self.pieces = 1

    def agreed(self, plan: BoundaryPlan, requests: Mapping[int, RequestState]) -> BoundaryPlan:
        """Process 0's plan, whatever this one's; and its `pieces`.

        requests: by key. Raises ValueError where they are not those of process 0.
        """
        plan = short_enough(plan, requests.values())
        wanted = reading_budget(self._decode_s if plan.decode else 0.0, plan.prefill_share)
        pieces = max(1, int(wanted / self._piece_s)) if self._piece_s else 1
        array = placing.from_first_process(to_array(plan, pieces, self._limits))
        plan, self.pieces = from_array(array, requests, self._limits)
        return plan

    def decoded(self, seconds: float) -> None:
        """The steps of a boundary took so long."""
        self._decode_s = seconds

    def has_read(self, pieces: int, seconds: float) -> None:
        """So many pieces of a prompt took so long."""
        if pieces:
            self._piece_s = seconds / pieces
