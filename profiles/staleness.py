"""Whether a profile describes a text: the stability it expects against the stability observed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flexijax.profiles.head_profile import HeadProfile

# Of the root mean square difference between expected and observed RCO of the stable heads.
MAX_DIFFERENCE = 0.12
# Reranks of a head before what was seen of it says anything.
MIN_RERANKS = 3


class HeadStability(NamedTuple):
    """What a run saw of one stable head.

    rco: mean random-corrected overlap of a choice with the one before; interval: steps between the
    two, mean; reranks: how many pairs of choices there were.
    """

    layer: int
    head: int
    rco: float
    interval: float
    reranks: int


@dataclass(frozen=True)
class ProfileFit:
    """How well a profile describes a text.

    observed, expected: mean RCO of the compared heads. difference: root mean square of observed
    less expected, over heads. stale: the difference is more than `MAX_DIFFERENCE`.
    """

    observed: float
    expected: float
    difference: float
    stale: bool


def expected_rco(profile: HeadProfile, layer: int, head: int, interval: float) -> float | None:
    """The RCO of a head at an offset of `interval` steps; None where the profile does not tell.

    Between the offsets that were measured it is a straight line in the logarithm of the offset;
    beyond them it is what the nearest one has.
    """
    measured = profile.measured.get("rco_at_lag")
    if not isinstance(measured, Mapping):
        return None
    known = sorted((int(lag), rows[layer][head]) for lag, rows in measured.items())
    known = [(lag, rco) for lag, rco in known if rco is not None]
    if not known:
        return None
    below = max((entry for entry in known if entry[0] <= interval), default=known[0])
    above = min((entry for entry in known if entry[0] >= interval), default=known[-1])
    if below[0] >= above[0]:
        return below[1]
    share = math.log(interval / below[0]) / math.log(above[0] / below[0])
    return below[1] + share * (above[1] - below[1])


def profile_fit(
    profile: HeadProfile,
    observed: Sequence[HeadStability],
    *,
    page_size: int,
    budget_pages: int,
    score: str,
) -> ProfileFit | None:
    """Compares head by head; None where the profile expects nothing or too little was observed.

    An expectation holds for the sizes and the page score with which it was measured: page_size,
    budget_pages and score of the run must be those of the profile, else the answer is None too.

    No profile is right in every head. With SmolLM2 and pages chosen by `sketch2`, the stable heads
    of one document differ from a profile of the other five tasks by 0.05 to 0.06 on each of ten
    documents (48 pairs of steps each), and by 0.06 to 0.09 where only three reranks are seen; a
    profile whose heads are permuted at random differs by 0.17 to 0.25. By `minmax` it was 0.03 to
    0.09 on each of 30 documents, 0.05 to 0.07 on program code, lists of numbers and shuffled words,
    and 0.16 on one sentence said over and over, where the heads lose their order.
    """
    measured_with = (profile.page_size, profile.budget_pages, profile.measured.get("score"))
    if measured_with != (page_size, budget_pages, score):
        return None
    pairs = [
        (found.rco, expected)
        for found in observed
        if found.reranks >= MIN_RERANKS
        and (expected := expected_rco(profile, found.layer, found.head, found.interval)) is not None
    ]
    if not pairs:
        return None
    difference = math.sqrt(math.fsum((rco - expected) ** 2 for rco, expected in pairs) / len(pairs))
    return ProfileFit(
        observed=math.fsum(rco for rco, _ in pairs) / len(pairs),
        expected=math.fsum(expected for _, expected in pairs) / len(pairs),
        difference=difference,
        stale=difference > MAX_DIFFERENCE,
    )
