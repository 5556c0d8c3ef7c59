"""What a device's memory is worth: the most requests that fit, and the tokens a second they make.

Counted from the layout. Full attention for as many requests as the policy holds need not fit, so
that both are compared at equal memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from flexijax.aot.estimate import DRAM_EFFICIENCY, Estimate
from flexijax.aot.footprint import Footprint, footprint
from flexijax.aot.targets import Target
from flexijax.config import CacheConfig
from flexijax.models.config import ModelConfig

GB = 10**9
DEVICE_BYTES = (80 * GB, 94 * GB)
MOST_REQUESTS = 4096


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What compiling told, for other batches to start from.

    counted: at the compiled batch; step: a decode step with its share of a rerank; temporaries:
    the most device bytes of any program.
    """

    counted: Footprint
    step: Estimate
    temporaries: int


@dataclasses.dataclass(frozen=True)
class Capacity:
    """One policy in so much device memory; seconds are those of a decode step of all requests.

    used_bytes: weights, cache, one prompt while it is read, temporaries. host_bytes: pinned.
    estimated_seconds: of full attention its bytes alone, without any launch, in its favour.
    """

    policy: str
    device_bytes: int
    requests: int
    used_bytes: int
    host_bytes: int
    roofline_seconds: float
    estimated_seconds: float

    @property
    def roofline_tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.requests / self.roofline_seconds if self.requests else 0.0

    @property
    def estimated_tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.requests / self.estimated_seconds if self.requests else 0.0


def capacities(
    config: ModelConfig,
    *,
    name: str,
    cache: CacheConfig,
    context: int,
    target: Target,
    compiled: Compiled,
    device_bytes: Sequence[int] = DEVICE_BYTES,
) -> tuple[Capacity, ...]:
    """The policy and full attention in each of `device_bytes`; arguments as `compile_report`."""

    def count(of: CacheConfig, batch: int) -> Footprint:
        return footprint(config, name=name, cache=of, context=context, batch=batch, target=target)[
            0
        ]

    def choose(policy: str, of: CacheConfig, room: int) -> Capacity:
        batch = _most(lambda batch: _used(count(of, batch), compiled) <= room)
        counted = count(of, max(batch, 1))
        step = None if policy == "full" else compiled.step
        return Capacity(
            policy=policy,
            device_bytes=room,
            requests=batch,
            used_bytes=_used(counted, compiled),
            host_bytes=counted.sizes.host_pages,
            roofline_seconds=counted.step.seconds,
            estimated_seconds=_seconds(counted, step, compiled.counted, target),
        )

    dense = cache.as_full()
    of = {cache.find_policy().name: cache, "full": dense}
    return tuple(choose(policy, of[policy], room) for room in device_bytes for policy in of)


def _used(counted: Footprint, compiled: Compiled) -> int:
    sizes = counted.sizes
    return sum(dataclasses.astuple(sizes)) - sizes.host_pages + compiled.temporaries


def _seconds(
    counted: Footprint, step: Estimate | None, at_compiled: Footprint, target: Target
) -> float:
    """The compiled estimate, and the bytes that this batch reads more; launches stay as many."""
    more = _read(counted) - (_read(at_compiled) if step else 0)
    return (step.seconds if step else 0.0) + more / (
        target.device_bytes_per_second * DRAM_EFFICIENCY
    )


def _read(counted: Footprint) -> int:
    return counted.step.weight_bytes + counted.step.attention.total


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by halving; 0 if none does."""
    low, high = 0, 1
    while high <= MOST_REQUESTS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
