"""What a preset's programs are once compiled for a GPU: bytes by tier, kernels, time per step."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from flexijax import cache as kv
from flexijax.config import CacheConfig
from flexijax.decode import decode_chunk
from flexijax.engine import free_rows
from flexijax.generate import make_layout
from flexijax.memory import summary_bytes
from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.pallas_kernels import aot, platform
from flexijax.pallas_kernels.aot import CompiledReport, MemoryReport
from flexijax.pallas_kernels.disassembly import KernelReport
from flexijax.pallas_kernels.targets import Target
from flexijax.policy import make
from flexijax.prefill import Program, new_workspace, prefill_chunk
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
OURS = "flexijax_"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Bytes of what a decode chunk is given: device memory, then pinned host memory."""

    weights: int
    kv_pages: int
    slots: int
    summaries: int
    tables: int  # block table, lengths, slot pages, counters, rows
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


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time of one decode step: bytes over bandwidth, or flops over the peak."""

    weight_bytes: int
    attention: StepBytes
    flops: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """One compiled program. kernels: ours, the costliest of each name.

    pool_copies: copies of at least the smallest array of keys or values. unaliased: cache leaves
    that are not updated in place.
    """

    lower_seconds: float
    compile_seconds: float
    device: MemoryReport
    host: MemoryReport
    pool_copies: int
    pool_bytes: int
    host_callbacks: int
    collectives: int
    unaliased: tuple[str, ...]
    kernels: tuple[KernelReport, ...]


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A model's decode and prefill chunk on one GPU, at one context, batch and policy.

    device_kv_fraction: keys and values in device memory over those of full attention, without
    summaries and with them.
    """

    model: str
    target: str
    profile: str | None
    cache: CacheConfig
    context: int
    batch: int
    sizes: Sizes
    full_kv_bytes: int
    device_kv_fraction: float
    device_kv_fraction_with_summaries: float
    step: Roofline
    full_step: Roofline
    decode: ProgramReport
    prefill: ProgramReport


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


def compile_report(
    config: ModelConfig,
    *,
    name: str,
    cache: CacheConfig,
    profile: HeadProfile | None,
    context: int,
    batch: int,
    target: Target,
) -> CompileReport:
    """Compiles the decode chunk and the prefill chunk of a model for `target` and reports on both.

    context: tokens of each of `batch` requests, new ones included. profile: for mode "flexi".
    Raises ValueError for sizes that cannot be, RuntimeError without the `aot` extra.
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
    aot.prepare()
    program = make_program(config, cache, profile=profile, context=context, batch=batch)
    full = make_program(
        config,
        dataclasses.replace(cache, mode="full"),
        profile=None,
        context=context,
        batch=batch,
    )
    params = Decoder(config).abstract(dtype=jnp.dtype(DTYPE))
    cache_shapes = abstract_cache(program)
    sizes = _sizes(params, cache_shapes)
    full_kv = full.layout.num_slotted * full.layout.blocks * full.layout.page_bytes
    on_device = sizes.kv_pages + sizes.slots
    return CompileReport(
        model=name,
        target=target.name,
        profile=profile and f"{profile.model}, {profile.budget_pages} pages ({profile.source})",
        cache=cache,
        context=context,
        batch=batch,
        sizes=sizes,
        full_kv_bytes=full_kv,
        device_kv_fraction=on_device / full_kv,
        device_kv_fraction_with_summaries=(on_device + sizes.summaries) / full_kv,
        step=_roofline(config, program, params, target),
        full_step=_roofline(config, full, params, target),
        decode=_decode(program, params, cache_shapes, target),
        prefill=_prefill(program, params, target),
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


def abstract_cache(program: Program) -> kv.Cache:
    """The cache as `jax.ShapeDtypeStruct`s, each with the memory that it lies in."""
    layout, score = program.layout, program.policy.score

    def empty() -> kv.Cache:
        return kv.init(layout, score)

    cache = _placed(jax.eval_shape(empty), "device")
    return dataclasses.replace(cache, host=_placed(cache.host, "pinned_host"))


def _placed(tree: Any, memory: str) -> Any:
    sharding = platform.sharding(memory)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _decode(program: Program, params: Any, cache: kv.Cache, target: Target) -> ProgramReport:
    rows = _placed(jax.eval_shape(functools.partial(free_rows, program.layout.rows)), "device")
    device = platform.sharding()
    compiled = aot.compile_for(
        functools.partial(decode_chunk, program),
        (params, cache, rows),
        target=target,
        donate_argnums=(1,),
        kernels_named=OURS,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, cache), device, device),
    )
    pools = [
        getattr(layer, name)
        for layer in (*cache.layers, *cache.host)
        for name in ("pages_k", "slots_k", "k")
        if getattr(layer, name, None) is not None
    ]
    return _program_report(compiled, params, cache, min(map(_nbytes, pools)))


def _prefill(program: Program, params: Any, target: Target) -> ProgramReport:
    workspace = _placed(jax.eval_shape(functools.partial(new_workspace, program.layout)), "device")
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, program.chunk), jnp.int32)

    def chunk(params, workspace, tokens, start, last):
        return prefill_chunk(program, params, tokens, start, last, workspace)

    compiled = aot.compile_for(
        chunk,
        (params, workspace, tokens, scalar, scalar),
        target=target,
        donate_argnums=(1,),
        kernels_named=OURS,
    )
    return _program_report(compiled, params, workspace, _nbytes(workspace.k[0]))


def _program_report(
    compiled: CompiledReport, params: Any, donated: Any, pool_bytes: int
) -> ProgramReport:
    """donated: the argument that stands behind the params, to be updated in place."""
    first = len(jax.tree.leaves(params))
    leaves = jax.tree_util.tree_leaves_with_path(donated)
    missing = [
        jax.tree_util.keystr(path)
        for at, (path, _) in enumerate(leaves, start=first)
        if at not in compiled.aliased_arguments
    ]
    costliest: dict[str, KernelReport] = {}
    for kernel in sorted(compiled.kernels, key=lambda k: (k.spill_bytes, k.registers)):
        costliest[kernel.name.rstrip("_0123456789")] = kernel
    return ProgramReport(
        lower_seconds=compiled.lower_seconds,
        compile_seconds=compiled.compile_seconds,
        device=compiled.device,
        host=compiled.host,
        pool_copies=compiled.copies(at_least=pool_bytes),
        pool_bytes=pool_bytes,
        host_callbacks=compiled.host_callbacks,
        collectives=compiled.collectives,
        unaliased=tuple(missing),
        kernels=tuple(costliest[name] for name in sorted(costliest)),
    )


def _sizes(params: Any, cache: kv.Cache) -> Sizes:
    layers = cache.layers
    return Sizes(
        weights=_nbytes(params),
        kv_pages=_nbytes([(layer.pages_k, layer.pages_v) for layer in layers]),
        slots=_nbytes([(layer.slots_k, layer.slots_v) for layer in layers]),
        summaries=_nbytes([(layer.paged_summaries, layer.slotted_summaries) for layer in layers]),
        tables=_nbytes(
            (cache.block_table, cache.lengths, cache.counters, [la.slot_page for la in layers])
        ),
        host_pages=_nbytes(cache.host),
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


def _roofline(config: ModelConfig, program: Program, params: Any, target: Target) -> Roofline:
    layout = program.layout
    read = step_bytes(program)
    # Of the embedding a step reads one row a request, unless it is the head as well.
    table = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) - table
    attended = (read.pages + read.slots) // layout.page_bytes * layout.page_size
    per_token = 4 * layout.shape.group_size * layout.shape.head_dim  # q.k and weight.v
    flops = 2 * weights * layout.rows + attended * per_token
    weight_bytes = weights * jnp.dtype(DTYPE).itemsize
    seconds = max(
        (weight_bytes + read.total) / target.device_bytes_per_second,
        flops / target.bfloat16_flops_per_second,
    )
    return Roofline(weight_bytes=weight_bytes, attention=read, flops=flops, seconds=seconds)


def _nbytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
