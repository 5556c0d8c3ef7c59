"""Dense attention: every page of every head on the device, everything attended."""

from __future__ import annotations

import dataclasses

from flexijax.policies.base import HeadGroup, Policy, RunSpec, Tier


@dataclasses.dataclass(frozen=True)
class Full(Policy):
    """The baseline and the oracle. Device bytes: all S tokens of all heads."""

    def groups(self, layer: int, run: RunSpec) -> tuple[HeadGroup, ...]:
        """One group: see `Policy`."""
        return (HeadGroup(run.all_heads, (Tier(None),)),)
