"""A request whose prompt is being read."""

from __future__ import annotations

import dataclasses

import jax

from flexijax.engine.execute import Place
from flexijax.engine.prefiller import Reading
from flexijax.engine.sequence import Request, Sequence


@dataclasses.dataclass
class Prompting:
    """A request whose prompt is being read into its row.

    reading: None where it had been read before. seconds: spent on it so far, without compiling.
    """

    request: Request
    place: Place
    sequence: Sequence
    reading: Reading | None
    x: jax.Array | None = None
    seconds: float = 0.0
