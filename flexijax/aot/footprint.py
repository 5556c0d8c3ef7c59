"""What a preset takes on a GPU, counted from the layout of its cache: bytes by tier, step times."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.aot.targets import Target
from flexijax.cache.cache import abstract
from flexijax.cache.layout import page_bytes, slots_of, tail_pages
from flexijax.cache.memory import nbytes, summary_bytes
from flexijax.cache.prefill_kv import empty_prefill_kv
from flexijax.config import CacheConfig
from flexijax.engine.plan import make_layout
from flexijax.engine.program import BOUNDARY_STEPS, Program
from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.pallas_kernels import platform
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
# Of each request, where a policy keeps what is generated in a buffer of its own.
NEW_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes in device memory, then in pinned host memory."""

    weights: int
    kv_pages: int
    slots: int
    summaries: int  # of pages, and what the score keeps of requests
    tables: int  # block table, lengths, slot pages, counters
    prefill: int  # a prompt's hidden states while it is read, and one layer's keys and values
    host_pages: int


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes that attention reads in one decode step of the whole batch, every request full.

    tokens: of KV heads, that it reads for them.
    """

    pages: int
    slots: int
    tokens: int
    scoring: int  # every step's of selected heads, and a rerank's share of offloaded ones

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
    the host per step, a rerank's share. page_seconds: per step, for every page that each
    offloaded head of each request brings at a rerank, over the link to the host.
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
    dense = cache.as_full()
    with platform.compiling_for("gpu"):
        program = make_program(config, cache, context=context, batch=batch)
        full = make_program(config, dense, context=context, batch=batch)
        sizes, of = _sizes(config, program), full.layout.sizes
    full_kv = full.layout.heads_of("dense") * of.blocks * of.page_bytes
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


def make_program(config: ModelConfig, cache: CacheConfig, *, context: int, batch: int) -> Program:
    """As `engine.plan.make_program`, for a GPU's memory instead of this machine's.

    Raises ValueError where the policy needs a profile and `cache.profile` is no `HeadProfile` of
    such a model.
    """
    policy, shape, profile = cache.find_policy(), config.attention_shape, None
    if policy.needs_profile and isinstance(cache.profile, HeadProfile):
        profile = cache.profile
        profile.check(num_layers=shape.num_layers, num_kv_heads=shape.num_kv_heads)
    layout = make_layout(
        cache,
        shape,
        profile=profile,
        dtype=cache.dtype or DTYPE,
        max_tokens=context,
        max_new_tokens=min(context, NEW_TOKENS),
        batch=batch,
    )
    return Program(
        Decoder(config),
        layout,
        policy,
        cache.implementation,
        cache.transfer,
        boundary_steps=BOUNDARY_STEPS,
    )


def abstract_params(config: ModelConfig) -> Any:
    """The model's weights as `jax.ShapeDtypeStruct`s."""
    return Decoder(config).abstract(dtype=jnp.dtype(DTYPE))


def _sizes(config: ModelConfig, program: Program) -> Sizes:
    layout = program.layout
    cache, banks = abstract(layout, program.policy), layout.sizes.banks
    pages = slots = summaries = 0
    for layer, at, group in layout.all_groups():
        arrays = cache.layer(layer, 0).groups[at]
        held = nbytes((arrays.k, arrays.v))
        if group.ladder[0].codec is not None:  # k and v are those of pages that are not full
            selected = group.kind == "selected"
            coded = nbytes(arrays.codes) if selected else banks * nbytes(arrays.slots)
            held = banks * held + coded
        elif group.kind != "selected":
            held *= banks
        pages += held if group.kind == "selected" else 0
        slots += held if group.kind != "selected" else 0
        if group.score is not None:
            summaries += nbytes(arrays.summaries) + banks * nbytes(arrays.score_state)
    host = nbytes([layer.host for layer in cache.pools])
    spec = program.prefill_spec()
    kv = jax.eval_shape(lambda: empty_prefill_kv(spec))
    return Sizes(
        weights=nbytes(abstract_params(config)),
        kv_pages=pages,
        slots=slots,
        summaries=summaries,
        tables=nbytes(cache) - host - pages - slots - summaries,
        prefill=nbytes((kv.k, kv.v)) + spec.tokens * config.hidden_size * jnp.dtype(DTYPE).itemsize,
        host_pages=host,
    )


def step_bytes(program: Program) -> StepBytes:
    """What attention reads in a step when every request fills its pages; from the layout alone."""
    layout, sizes = program.layout, program.layout.sizes
    pages = slots = attended = 0
    scoring = 0.0
    for *_, group in layout.all_groups():
        heads = len(group.heads)
        scored = heads * sizes.pages * summary_bytes(layout, group)
        codec = group.ladder[0].codec
        tail = 0 if codec is None else heads * tail_pages(sizes) * sizes.page_bytes
        if group.kind == "selected":
            chosen = heads * min(group.attends or 0, sizes.pages)
            attended += chosen
            pages += chosen * page_bytes(sizes, codec) + tail
            scoring += scored
        else:
            attended += heads * slots_of(group, sizes)
            slots += heads * slots_of(group, sizes) * page_bytes(sizes, codec) + tail
            scoring += scored / sizes.chunk_steps
    return StepBytes(
        pages=sizes.batch * pages,
        slots=sizes.batch * slots,
        tokens=sizes.batch * attended * sizes.page_size,
        scoring=round(sizes.batch * scoring),
    )


def _roofline(config: ModelConfig, program: Program, target: Target) -> Roofline:
    sizes, read = program.layout.sizes, step_bytes(program)
    # Of the embedding a step reads one row a request, unless it is the head as well.
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    leaves = jax.tree.leaves(abstract_params(config))
    weights = sum(math.prod(leaf.shape) for leaf in leaves) - table
    per_token = 4 * sizes.shape.group_size * sizes.shape.head_dim  # q.k and weight.v
    flops = 2 * weights * sizes.batch + read.tokens * per_token
    weight_bytes = weights * jnp.dtype(DTYPE).itemsize
    seconds = max(
        (weight_bytes + read.total) / target.device_bytes_per_second,
        flops / target.bfloat16_flops_per_second,
    )
    # All offloaded heads of all requests, one page each.
    layout = program.layout
    moved = sizes.batch * layout.heads_of("offloaded") * layout.moved_page_bytes
    return Roofline(
        weight_bytes=weight_bytes,
        attention=read,
        flops=flops,
        seconds=seconds,
        stored_bytes=moved // sizes.page_size,
        page_seconds=moved / sizes.chunk_steps / target.host_bytes_per_second,
    )
