"""Chunks of decode steps that take turns within one decode, and what they are to each other.

A shared machine is slow for seconds at a time. What is compared a second apart meets the same.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence

import flexijax
from bench.timing import median

# Steps from one rerank of a row to the next.
CHUNK = 16
# Each kind is in each place of a turn equally often.
ORDERS = tuple(itertools.permutations(("held", "served", "beside")))
# "" is between turns.
HELD = ("held", "beside")


class Turns:
    """Times `engine.step`, whoever calls it, and says of what kind the coming steps are.

    boundary: called with that after each call. found: milliseconds a step of each kind, of each
    turn; in a turn all rows run.
    """

    def __init__(
        self, engine: flexijax.Engine, rows: int, boundary: Callable[[str], object]
    ) -> None:
        self._engine, self._boundary = engine, boundary
        self._all_rows, self._each = rows * engine.boundary_steps, CHUNK // engine.boundary_steps
        self._step, self._made = engine.step, engine.totals.new_tokens
        self._turn: dict[str, float] = {}
        self._since, self._left = 0.0, 0
        self.found: list[dict[str, float]] = []
        self.kind = ""
        engine.step = self.step

    def step(self) -> bool:
        """`Engine.step`."""
        left = self._step()
        now, made = time.perf_counter(), self._engine.totals.new_tokens
        together, self._made = made - self._made == self._all_rows, made
        if not (left and together):
            # Prompts are read, or rows have ended: nothing is held back.
            self._turn, self._left, self.kind = {}, 0, ""
        elif self._left > 1:
            self._left -= 1
        else:
            if self._left:
                self._turn[self.kind] = 1e3 * (now - self._since) / CHUNK
            if len(self._turn) == len(ORDERS[0]):
                self.found.append(self._turn)
                self._turn = {}
            order = ORDERS[len(self.found) % len(ORDERS)]
            self.kind, self._since, self._left = order[len(self._turn)], now, self._each
        self._boundary(self.kind)
        return left

    def close(self) -> None:
        """Leaves the engine as it was."""
        self._engine.step = self._step


def ratio(turns: Sequence[dict[str, float]], to: str) -> dict[str, float]:
    """Of served steps to others of their turns: the median, and its 95 % interval.

    The interval is between two of the ratios, by how often each side of the median is drawn.
    """
    ratios = sorted(turn["served"] / turn[to] for turn in turns)
    away = math.ceil(0.98 * math.sqrt(len(ratios)))
    low, high = (len(ratios) - 1) // 2 - away, len(ratios) // 2 + away
    return {
        f"to_{to}": median(ratios),
        f"to_{to}_from": ratios[max(low, 0)],
        f"to_{to}_to": ratios[min(high, len(ratios) - 1)],
    }
