"""The page scores by name, for a command line or a table."""

from __future__ import annotations

from flexijax.policies.minmax import MinMax
from flexijax.policies.page_score import PageScore
from flexijax.policies.sketch import Sketch

SCORES: dict[str, PageScore] = {
    "minmax": MinMax(),
    "minmax8": MinMax("int8"),
    "sketch1": Sketch(1),
    "sketch2": Sketch(2),
    "sketch4": Sketch(4),
}


def name_of(score: PageScore) -> str:
    """The name of a score in `SCORES`, else how it is written: MinMax(dtype='int8')."""
    return next((name for name, known in SCORES.items() if known == score), repr(score))
