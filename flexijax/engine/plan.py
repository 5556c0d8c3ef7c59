"""From a configuration to a program: the policy's head groups, sizes, and what fits the memory."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexijax.cache.layout import CacheLayout, CacheSizes
from flexijax.cache.memory import available_bytes, cache_bytes
from flexijax.cache.prefill_kv import prefill_bytes
from flexijax.config import CacheConfig
from flexijax.engine.mesh import over_mesh, sharing_host, weight_bytes
from flexijax.engine.program import Program
from flexijax.engine.sampling import METHODS, Sampling, method_of
from flexijax.models.config import AttentionShape
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform
from flexijax.policies.base import RunSpec, check_groups, check_sources
from flexijax.policies.coded_tiers import with_codecs
from flexijax.policies.page_score import PageShape
from flexijax.profiles import lookup
from flexijax.profiles.head_profile import HeadProfile


def make_program(
    lm: LanguageModel,
    cache: CacheConfig,
    *,
    max_tokens: int,
    max_new_tokens: int | None = None,
    batch: int = 1,
    sampling: Sequence[Sampling] = (),
    boundary_steps: int | None = None,
    shared_reading: bool = False,
    mesh: Mesh | None = None,
) -> Program:
    """The static part of a run: policy, and a layout of bucketed sizes that fits the memory.

    max_tokens: of the longest request, its max_new_tokens included (None: as many may be new).
    batch: requests wanted at once; fewer where memory is short.
    sampling: of the requests, by which the decode program is chosen. boundary_steps: see `Program`.
    shared_reading: whether all layers of a prompt are kept, to be committed to several caches.
    mesh: over whose devices it runs; None: on one.
    A profile that is not measured yet ("auto") must have been, see `profiling.choose`.
    Raises ValueError when not even one request fits, or the profile is missing or of another model.
    """
    policy = cache.find_policy()
    profile = find_profile(lm, cache) if policy.needs_profile else None
    dtype = cache.dtype or jnp.dtype(lm.dtype).name

    def layout(batch: int) -> CacheLayout:
        return make_layout(
            cache,
            lm.attention,
            profile=profile,
            dtype=dtype,
            max_tokens=max_tokens,
            max_new_tokens=max_tokens if max_new_tokens is None else max_new_tokens,
            batch=batch,
        )

    def program(batch: int) -> Program:
        made = Program(
            lm.decoder,
            layout(batch),
            policy,
            cache.implementation,
            cache.transfer,
            sampling=max(map(method_of, sampling), key=METHODS.index, default=METHODS[0]),
            boundary_steps=boundary_steps,
        )
        return over_mesh(made, mesh)

    layers = lm.attention.num_layers if shared_reading else 1
    batch = 1 << (batch - 1).bit_length()
    while not _fits(needed := _needed(lm, made := program(batch), layers), sharing_host(made)):
        if batch == 1:
            raise ValueError(_too_little(needed, max_tokens))
        batch //= 2
    return made


def make_layout(
    cache: CacheConfig,
    shape: AttentionShape,
    *,
    profile: HeadProfile | None,
    dtype: str,
    max_tokens: int,
    max_new_tokens: int,
    batch: int,
    blocks: int | None = None,
    in_buckets: bool = True,
    bank: int | None = None,
) -> CacheLayout:
    """The layout for `batch` requests of up to max_tokens each.

    blocks: of the pools; None: as many as all requests can come to need. in_buckets: with room for
    a few more tokens, so that other requests find the same programs compiled. bank: see
    `CacheSizes`.
    """
    pages, new_pages = (-(-tokens // cache.page_size) for tokens in (max_tokens, max_new_tokens))
    if in_buckets:
        pages, new_pages = bucket(pages), bucket(new_pages)
    tail = max(1, platform.prefill_sizes()[1] // cache.page_size)
    pages = -(-pages // tail) * tail  # prompts are read in whole tails
    new_tokens = new_pages * cache.page_size
    # A chunk runs all its steps, and nothing is reranked for a request that has ended.
    chunk_steps = min(cache.chunk_steps, new_tokens)
    run = RunSpec(
        shape=shape,
        page_size=cache.page_size,
        budget_tokens=cache.budget_tokens,
        max_tokens=max_tokens,
        max_new_tokens=new_tokens,
        chunk_steps=chunk_steps,
        adaptive=cache.adaptive,
        profile=profile,
    )
    policy, groups = cache.find_policy(), []
    for layer in range(shape.num_layers):
        groups.append(tuple(policy.groups(layer, run)))
        check_groups(groups[-1], num_kv_heads=shape.num_kv_heads, layer=layer)
    check_sources(tuple(groups))
    coded = with_codecs(tuple(groups), cache.codecs, policy=policy.name)
    for tier in (tier for groups in coded for group in groups for tier in group.ladder):
        if tier.codec is not None:
            page = PageShape(cache.page_size, shape.head_dim, dtype)
            tier.codec.check(page, f"{tier.memory}_codec")
    sizes = CacheSizes(
        shape=shape,
        batch=batch,
        blocks=batch * pages if blocks is None else blocks,
        pages=pages,
        page_size=cache.page_size,
        dtype=dtype,
        chunk_steps=chunk_steps,
        bank=bank,
    )
    return CacheLayout(sizes, coded)


def find_profile(lm: LanguageModel, cache: CacheConfig) -> HeadProfile:
    """The profile that the configuration names, or the shipped one of the model.

    Raises ValueError when there is none, or it is of another model.
    """
    profile = cache.profile
    if isinstance(profile, str):
        profile = lookup.load(profile)
    if profile is None:
        profile = lookup.find(lm, cache.budget_pages)
    if profile is None:
        raise ValueError(
            f"profile=None: no profile of {lm.name!r} is shipped; pass profile='auto' to measure "
            "one on the prompt, measure one with `flexijax profile`, pass a HeadProfile, or use "
            "policy='quest' or 'full'"
        )
    profile.check(
        num_layers=lm.attention.num_layers,
        num_kv_heads=lm.attention.num_kv_heads,
        fingerprint=lm.fingerprint,
    )
    return profile


def origin_of(asked: HeadProfile | str | None, found: HeadProfile) -> str:
    """In words, where a profile came from that `find_profile` found for the one `asked` for."""
    if isinstance(asked, HeadProfile):
        return "given by the caller"
    if asked is not None and asked != "auto":
        return f"{'shipped' if asked in lookup.names() else 'read from the file'} {asked}"
    return f"shipped for {found.model} at {found.budget_pages} pages"


def bucket(pages: int) -> int:
    """Rounds up to an eighth of the power of two above: few programs, little waste.

    67 -> 80, 494 -> 512, 5 -> 8
    """
    power = 1 << max(pages - 1, 1).bit_length()
    step = max(power // 8, 8)
    return -(-pages // step) * step


def _needed(lm: LanguageModel, program: Program, layers: int) -> tuple[int, int]:
    """(device bytes, host bytes) of a cache and a prompt of which so many layers are held."""
    device, host = cache_bytes(program.layout, program.policy)
    device += weight_bytes(lm, program)
    width = token_bytes(lm)
    return device + prefill_bytes(program.prefill_spec(), width=width, layers=layers), host


def token_bytes(lm: LanguageModel) -> int:
    """Bytes of what a token is between two layers of the model."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    x = jax.eval_shape(lm.decoder.embed, lm.params, token)
    return x.shape[-1] * x.dtype.itemsize


def _fits(needed: tuple[int, int], devices: int) -> bool:
    """Whether so many devices of this machine have what each needs."""
    device, host = needed
    free_device, free_host = available_bytes()
    if free_device == free_host:  # one memory
        return devices * (device + host) <= 0.9 * free_device
    return device <= 0.9 * free_device and devices * host <= 0.9 * free_host


def _too_little(needed: tuple[int, int], max_tokens: int) -> str:
    device, host = needed
    free_device, free_host = available_bytes()
    pinned, raised = platform.max_pinned_bytes(), ""
    if pinned is not None and host > 0.9 * pinned:
        limit = f"{pinned >> 30} GB of host memory"
        raised = f" (XLA pins at most {limit}: {platform.PINNED_LIMIT} says how many)"
    return (
        f"{max_tokens} tokens of context need {device / 1e9:.2f} GB on the device (free: "
        f"{free_device / 1e9:.2f}) and {host / 1e9:.2f} GB on the host (free: "
        f"{free_host / 1e9:.2f}){raised}: shorten the prompt, lower budget_tokens, or use "
        "dtype='bfloat16'"
    )
