"""What a preset takes on a GPU, counted from the layout of its cache: bytes by tier, step times."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.aot.targets import Target
from flexijax.cache import cache as kv
from flexijax.cache.attention import Workspace
from flexijax.cache.memory import summary_bytes
from flexijax.config import CacheConfig
from flexijax.engine.prefill import Program, new_workspace
from flexijax.generate import make_layout
from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.pallas_kernels import platform
from flexijax.policies.base import make
from flexijax.profiles import lookup
from flexijax.profiles.head_profile import HeadProfile

# Presets are named after the base model, profiles after the one that follows instructions.
_PROFILED = {
    "llama-3.1-8b": "Llama-3.1-8B-Instruct",
    "mistral-7b-v0.2": "Mistral-7B-Instruct-v0.2",
    "mistral-small-24b": "Mistral-Small-24B-Instruct-2501",
    "qwen2.5-32b": "Qwen2.5-32B-Instruct",
    "smollm2-135m": "SmolLM2-135M-Instruct",
}
DTYPE = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes in device memory, then in pinned host memory."""

    weights: int
    kv_pages: int
    slots: int
    summaries: int  # of pages, and what the score keeps of requests
    tables: int  # block table, lengths, slot pages, counters
    workspace: int  # keys and values of one prompt while it is read
    host_pages: int


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes that attention reads in one decode step of the whole batch, every request full."""

    pages: int
    slots: int
    scoring: int  # every step's of paged heads, and a rerank's share of slotted heads

    @property
    def total(self) -> int:
        return self.pages + self.slots + self.scoring

    @property
    def scoring_share(self) -> float:
        """Of all that attention reads."""
        return self.scoring / self.total


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of one decode step: bytes over bandwidth, or flops over the peak.

    Host traffic is apart, since what a rerank brings depends on the text. stored_bytes: written to
    the host per step, a rerank's share. page_seconds: per step, for every page that each slotted
    head of each request brings at a rerank, over the link to the host.
    """

    weight_bytes: int
    attention: StepBytes
    flops: int
    seconds: float
    stored_bytes: int
    page_seconds: float


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What a model takes at one context, batch and policy, counted from the cache's layout.

    device_kv_fraction: keys and values in device memory over those of full attention, without
    summaries and with them. step: of this policy; full_step: of full attention.
    """

    sizes: Sizes
    full_kv_bytes: int
    device_kv_fraction: float
    device_kv_fraction_with_summaries: float
    step: Roofline
    full_step: Roofline


def footprint(
    config: ModelConfig,
    *,
    name: str,
    cache: CacheConfig,
    profile: HeadProfile | None,
    context: int,
    batch: int,
    target: Target,
) -> tuple[Footprint, Program]:
    """Counts, without compiling anything; see `compile_report` for the arguments.

    Returns the program that was counted as well. Raises ValueError for sizes that cannot be.
    """
    for argument, value in (("context", context), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument}={value!r} must be a positive integer")
    if context > config.max_context:
        raise ValueError(f"context={context} is more than the {config.max_context} of {name}")
    if cache.mode != "flexi":
        profile = None
    elif profile is not None:
        profile.check(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads)
    program = make_program(config, cache, profile=profile, context=context, batch=batch)
    dense = dataclasses.replace(cache, mode="full")
    full = make_program(config, dense, profile=None, context=context, batch=batch)
    sizes = _sizes(config, program)
    full_kv = full.layout.num_slotted * full.layout.blocks * full.layout.page_bytes
    on_device = sizes.kv_pages + sizes.slots
    counted = Footprint(
        sizes=sizes,
        full_kv_bytes=full_kv,
        device_kv_fraction=on_device / full_kv,
        device_kv_fraction_with_summaries=(on_device + sizes.summaries) / full_kv,
        step=_roofline(config, program, target),
        full_step=_roofline(config, full, target),
    )
    return counted, program


def shipped_profile(preset: str, budget_pages: int) -> HeadProfile | None:
    """The profile shipped for a preset at the nearest budget, or None."""
    return lookup.find(_PROFILED.get(preset, preset), budget_pages)


def assumed_profile(config: ModelConfig, cache: CacheConfig) -> HeadProfile:
    """Stands in where nothing was measured: a quarter of the heads, evenly over the layers."""
    heads = config.num_kv_heads
    quarter = range(config.num_layers * heads // 4)
    pairs = [divmod(4 * at + at // max(heads // 4, 1) % 4, heads) for at in quarter]
    return HeadProfile(
        model=config.family,
        num_layers=config.num_layers,
        num_kv_heads=heads,
        unstable=tuple(pairs),
        page_size=cache.page_size,
        budget_pages=cache.budget_pages,
        source="assumed: a quarter of the heads, evenly spread",
    )


def make_program(
    config: ModelConfig,
    cache: CacheConfig,
    *,
    profile: HeadProfile | None,
    context: int,
    batch: int,
) -> Program:
    """As `generate.make_program`, for a GPU's memory instead of this machine's."""
    shape = config.attention_shape
    dtype = cache.dtype or DTYPE
    policy = make(cache, profile=profile, num_layers=shape.num_layers, dtype=dtype)
    return Program(
        decoder=Decoder(config),
        layout=make_layout(
            policy, shape, page_size=cache.page_size, max_tokens=context, rows=batch, dtype=dtype
        ),
        policy=policy,
        rerank_interval=cache.chunk_steps,
        implementation=cache.implementation,
        transfer=cache.transfer,
    )


def abstract_params(config: ModelConfig) -> Any:
    """The model's weights as `jax.ShapeDtypeStruct`s."""
    return Decoder(config).abstract(dtype=jnp.dtype(DTYPE))


def abstract_workspace(program: Program) -> Workspace:
    """The prefill workspace as `jax.ShapeDtypeStruct`s."""
    return platform.placed(jax.eval_shape(functools.partial(new_workspace, program.layout)))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _sizes(config: ModelConfig, program: Program) -> Sizes:
    cache = kv.abstract(program.layout, program.policy.score)

    def of(*names: str) -> int:
        return nbytes([[getattr(layer, name) for name in names] for layer in cache.layers])

    return Sizes(
        weights=nbytes(abstract_params(config)),
        kv_pages=of("pages_k", "pages_v"),
        slots=of("slots_k", "slots_v"),
        summaries=of("paged_summaries", "paged_state", "slotted_summaries", "slotted_state"),
        tables=of("slot_page", "pace") + nbytes((cache.block_table, cache.lengths, cache.counters)),
        workspace=nbytes(abstract_workspace(program)),
        host_pages=nbytes(cache.host),
    )


def step_bytes(program: Program) -> StepBytes:
    """What attention reads in a step when every request fills its pages; from the layout alone."""
    layout, policy = program.layout, program.policy
    scores = jax.ShapeDtypeStruct((1, 1, layout.pages), jnp.float32)
    chosen = jax.eval_shape(policy.select, scores).shape[-1] if layout.num_paged else 0
    scored = layout.num_paged
    if layout.offloads:
        scored += layout.num_slotted / program.rerank_interval
    summaries = scored * layout.pages * summary_bytes(layout, policy)
    return StepBytes(
        pages=layout.rows * layout.num_paged * chosen * layout.page_bytes,
        slots=layout.rows * layout.num_slotted * layout.slots * layout.page_bytes,
        scoring=round(layout.rows * summaries),
    )


def _roofline(config: ModelConfig, program: Program, target: Target) -> Roofline:
    layout = program.layout
    read = step_bytes(program)
    # Of the embedding a step reads one row a request, unless it is the head as well.
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    leaves = jax.tree.leaves(abstract_params(config))
    weights = sum(math.prod(leaf.shape) for leaf in leaves) - table
    attended = (read.pages + read.slots) // layout.page_bytes * layout.page_size
    per_token = 4 * layout.shape.group_size * layout.shape.head_dim  # q.k and weight.v
    flops = 2 * weights * layout.rows + attended * per_token
    weight_bytes = weights * jnp.dtype(DTYPE).itemsize
    seconds = max(
        (weight_bytes + read.total) / target.device_bytes_per_second,
        flops / target.bfloat16_flops_per_second,
    )
    # All slotted heads of all requests, one page each.
    page_bytes = layout.rows * layout.num_slotted * layout.page_bytes if layout.offloads else 0
    return Roofline(
        weight_bytes=weight_bytes,
        attention=read,
        flops=flops,
        seconds=seconds,
        stored_bytes=page_bytes // layout.page_size,
        page_seconds=page_bytes / program.rerank_interval / target.host_bytes_per_second,
    )
