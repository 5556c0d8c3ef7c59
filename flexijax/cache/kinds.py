"""The ways in which a head group may be kept, by `HeadGroup.kind`: a file of functions each."""

from __future__ import annotations

from types import ModuleType

from flexijax.cache import dense, evicting, offloaded, selected

KINDS: dict[str, ModuleType] = {
    "dense": dense,
    "selected": selected,
    "offloaded": offloaded,
    "evicting": evicting,
}
