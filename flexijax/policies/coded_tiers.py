"""Head groups as a policy states them, with the codecs that a configuration asks for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flexijax.policies.base import CODED, DEVICE, HOST, HeadGroup
from flexijax.policies.codec import Codec


def with_codecs(
    layers: tuple[tuple[HeadGroup, ...], ...], codecs: Mapping[str, Codec], *, policy: str
) -> tuple[tuple[HeadGroup, ...], ...]:
    """The head groups of a model with pages coded. codecs: by memory, "device" or "host".

    Raises ValueError where a group keeps all it has in a way that cannot be coded, or a codec has
    nothing to code.
    """
    found = []
    for layer, groups in enumerate(layers):
        for group in groups:
            if DEVICE in codecs and group.kind not in ("selected", "offloaded"):
                raise ValueError(
                    f"device_codec={codecs[DEVICE].name!r}: policy={policy!r} keeps heads of layer "
                    f"{layer} {group.kind}; pages are coded where heads select some of them at "
                    "every step, as those of 'quest' and the unstable ones of 'flexi'"
                )
        found.append(tuple(_coded(group, codecs) for group in groups))
    used = {tier.memory for groups in found for of in groups for tier in of.ladder if tier.codec}
    for memory in set(codecs) - used:
        raise ValueError(
            f"{memory}_codec={codecs[memory].name!r}: policy={policy!r} keeps no pages there that "
            "could be coded: leave it at None"
        )
    return tuple(found)


def _coded(group: HeadGroup, codecs: Mapping[str, Codec]) -> HeadGroup:
    """The group with what of it can be coded; slots are where the host has the same codec."""
    mine = {memory: codecs[memory] for memory in codecs if (memory, group.kind) in CODED}
    if group.kind == "offloaded" and mine.get(DEVICE) != mine.get(HOST):
        mine.pop(DEVICE, None)
    ladder = (dataclasses.replace(of, codec=mine.get(of.memory, of.codec)) for of in group.ladder)
    return dataclasses.replace(group, ladder=tuple(ladder))
