"""From a budget in bytes to the program of an engine: rows, blocks, and what each of them takes."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.sharding import Mesh

from flexijax.cache.layout import CacheLayout
from flexijax.cache.memory import available_bytes, cache_bytes
from flexijax.cache.prefill_kv import prefill_bytes
from flexijax.config import CacheConfig
from flexijax.engine.byte_counts import byte_count, in_words
from flexijax.engine.mesh import over_mesh, sharing_host, weight_bytes
from flexijax.engine.plan import find_profile, make_layout, token_bytes
from flexijax.engine.pool_sizes import PoolSizes, TierBytes, pool_sizes
from flexijax.engine.program import Program
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform


def sized_program(
    lm: LanguageModel,
    cache: CacheConfig,
    *,
    max_context: int,
    max_requests: int,
    usual_context: int | None,
    device_bytes: int | str | None,
    host_bytes: int | str | None,
    boundary_steps: int,
    mesh: Mesh | None = None,
) -> tuple[Program, PoolSizes]:
    """The program of an engine, and what its cache takes of the budgets; arguments: see `Engine`.

    Whether this machine has the budgets is not asked, see `check_there_is`. lm: its weights may be
    shapes. Raises ValueError with the arithmetic where not even one request fits the budgets.
    """
    profile = find_profile(lm, cache) if cache.find_policy().needs_profile else None
    make_whole = functools.partial(
        make_layout,
        cache,
        lm.attention,
        profile=profile,
        dtype=cache.dtype or jnp.dtype(lm.dtype).name,
        max_tokens=max_context,
        max_new_tokens=max_context,
        in_buckets=False,
        bank=platform.bank_rows(cache.implementation, max_requests),
    )

    def make(batch: int, blocks: int | None = None) -> Program:
        program = Program(
            lm.decoder,
            make_whole(batch=batch, blocks=blocks),
            cache.find_policy(),
            cache.implementation,
            cache.transfer,
            boundary_steps=boundary_steps,
        )
        return over_mesh(program, mesh)

    one = make(batch=1)
    reading = prefill_bytes(one.prefill_spec(), width=token_bytes(lm))
    device, host = tier_bytes(
        make(batch=1, blocks=1).layout, make(batch=2, blocks=1).layout, one, reading
    )
    pages = one.layout.sizes.pages
    most = max_requests * pages
    budgets = (
        _budget("device_bytes", device_bytes, device.total(rows=max_requests, blocks=most)),
        _budget("host_bytes", host_bytes, host.total(rows=max_requests, blocks=most)),
    )
    sizes = pool_sizes(
        device,
        host,
        device_bytes=budgets[0],
        host_bytes=budgets[1],
        max_requests=max_requests,
        max_context=pages * cache.page_size,
        usual_context=usual_context,
        page_size=cache.page_size,
    )
    return make(batch=sizes.rows, blocks=min(sizes.blocks, sizes.rows * pages)), sizes


def tier_bytes(
    smallest: CacheLayout, another_row: CacheLayout, program: Program, reading: int
) -> tuple[TierBytes, TierBytes]:
    """What a block and a row take in each tier, by the shapes of the arrays themselves.

    smallest: of one row and one block; another_row: of two rows. program: of one row and all the
    blocks that it may come to need. reading: bytes of a prompt while it is read.
    """
    counted = [
        cache_bytes(layout, program.policy) for layout in (smallest, another_row, program.layout)
    ]
    blocks, tiers = program.layout.sizes.blocks - 1, []
    for least, more_rows, more_blocks in zip(*counted, strict=True):
        block = (more_blocks - least) // blocks if blocks else 0
        row = more_rows - least
        tiers.append(TierBytes(block, row, {"tables": least - row - block}))
    device, host = tiers
    once = {**device.once, "a prompt that is read": reading}
    return TierBytes(device.block, device.row, once), host


def _budget(name: str, given: int | str | None, otherwise: int) -> int:
    return otherwise if given is None else byte_count(name, given)


def check_there_is(lm: LanguageModel, program: Program, sizes: PoolSizes) -> None:
    """Raises ValueError, with the arithmetic, where this machine has less than an engine takes.

    sizes: of its cache on each device, as `sized_program` found them; the weights come on top.
    """
    devices = sharing_host(program)  # of this machine, of which each is to have so much
    device, host = sizes.device_bytes + weight_bytes(lm, program), sizes.host_bytes * devices
    free_device, free_host = available_bytes()
    if free_device == free_host:  # one memory
        device *= devices
        if device + host > 0.9 * free_device:
            raise ValueError(
                f"the engine would take {in_words(device)} for the device's tier and "
                f"{in_words(host)} for the host's, and {in_words(free_device)} are free: lower "
                "max_requests, max_context, device_bytes or host_bytes"
            )
        return
    pinned = platform.max_pinned_bytes()
    for name, wanted, free in (("device", device, free_device), ("host", host, free_host)):
        if wanted <= 0.9 * free:
            continue
        limit = ""
        if name == "host" and pinned is not None and host > 0.9 * pinned:
            limit = f" (XLA pins at most {in_words(pinned)}: {platform.PINNED_LIMIT} says how many)"
        raise ValueError(
            f"the engine would take {in_words(wanted)} of {name} memory, and {in_words(free)} are "
            f"free{limit}: lower max_requests, max_context or {name}_bytes"
        )
