"""The ways in which a head group may be kept, by `HeadGroup.kind`: a file of functions each."""

from __future__ import annotations

from types import ModuleType

from flexijax.cache import coded_offloaded, coded_selected, dense, evicting, offloaded, selected
from flexijax.policies.base import HeadGroup

KINDS: dict[str, ModuleType] = {
    "dense": dense,
    "selected": selected,
    "offloaded": offloaded,
    "evicting": evicting,
}
_CODED: dict[str, ModuleType] = {"selected": coded_selected, "offloaded": coded_offloaded}


def kind_of(group: HeadGroup) -> ModuleType:
    """The functions over a group that has no places; whose pages the device has in codes: its own.

    See `cache.kind`.
    """
    kinds = KINDS if group.ladder[0].codec is None else _CODED
    return kinds[group.kind]
