"""A layer's decode attention as one kernel over all of its stores.

One program attends one KV head over a stretch of what it attends; a head's stretches are as many
programs. The first of them takes the new token from registers as the start of its running softmax
and writes it to its place: so nothing is read that has just been written, and no launch writes. The
last of them that is done merges the stretches: so no launch merges.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.arrivals import is_last, merge_parts
from flexijax.pallas_kernels.in_kernel import find_slot
from flexijax.pallas_kernels.online_softmax import (
    LOG2_E,
    Carry,
    load_query,
    normalized,
    softmax_over,
)
from flexijax.pallas_kernels.platform import pltriton
from flexijax.pallas_kernels.sparse_decode.tuning import MIN_ROWS, TuningConfig
from flexijax.pallas_kernels.stores import PageStore, Store


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    stores: tuple[Store, ...],
    arrivals: jax.Array | None = None,
    *,
    scale: float,
    config: TuningConfig | None = None,
) -> tuple[jax.Array, tuple[Store, ...], jax.Array]:
    """See `dispatch.decode_attention`."""
    batch, heads, group, width = q.shape
    page, dtype = stores[0].page_size, stores[0].k.dtype
    config = config or TuningConfig.choose(
        heads=batch * heads,
        tokens=max(_listed(store) for store in stores) * page,
        row_bytes=width * dtype.itemsize,
    )
    # One array where that can be: what makes q, k and v is then one launch.
    rows, fresh, first = q.reshape(batch, heads * group, width), jnp.concatenate([k, v], axis=1), 0
    if q.dtype == dtype:
        rows = fresh = jnp.concatenate([rows, k, v], axis=1)
        first = heads * group
    named = sum((store.heads for store in stores), ())
    in_order = named == tuple(range(heads))
    operands = [rows, fresh, *([] if in_order else [jnp.array(named, jnp.int32)])]
    if arrivals is None:
        arrivals = jnp.zeros((batch, heads), jnp.int32)
    shapes, aliases = [jax.ShapeDtypeStruct(q.shape, q.dtype)], {}
    if config.splits > 1:
        parts = (config.splits, batch, heads, group)
        aliases[len(operands)] = len(shapes)
        operands.append(arrivals)
        shapes += [
            jax.ShapeDtypeStruct(arrivals.shape, jnp.int32),
            jax.ShapeDtypeStruct((*parts, width), jnp.float32),
            jax.ShapeDtypeStruct(parts, jnp.float32),
        ]
    before = len(shapes)
    for store in stores:
        for pool in _matrices(store):
            aliases[len(operands)] = len(shapes)
            operands.append(pool)
            shapes.append(jax.ShapeDtypeStruct(pool.shape, pool.dtype))
        operands += _lists(store)
    kernel = functools.partial(
        _kernel,
        described=[(dataclasses.replace(store, k=None, v=None), store.v.shape) for store in stores],
        in_order=in_order,
        first=first,
        group=group,
        width=width,
        page=page,
        scale=scale * LOG2_E,
        config=config,
    )
    made = platform.pallas_kernel(
        kernel,
        name="flexijax_decode_attention",
        grid=(config.splits, heads, batch),
        out_shape=shapes,
        aliases=aliases,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )(*operands)
    kept, pools = [], made[before:]
    for at, store in enumerate(stores):
        k, v = pools[2 * at].reshape(store.k.shape), pools[2 * at + 1].reshape(store.v.shape)
        kept.append(dataclasses.replace(store, k=k, v=v))
    return made[0], tuple(kept), made[1] if config.splits > 1 else arrivals


def _lists(store: Store) -> list[jax.Array]:
    """What says where the store's tokens are: the first is `held`."""
    if isinstance(store, PageStore):
        return [store.held, store.pages, store.block_table]
    return [store.held] if store.slot_page is None else [store.held, store.slot_page]


def _listed(store: Store) -> int:
    """How many pages a head of the store attends at most."""
    return store.pages.shape[2] if isinstance(store, PageStore) else store.v.shape[2]


def _matrices(store: Store) -> tuple[jax.Array, jax.Array]:
    """Keys and values with the tokens of all pages along one axis."""
    rows = store.v.reshape(-1, store.v.shape[-1])
    if isinstance(store, PageStore):
        return store.k.reshape(rows.shape), rows
    return store.k.reshape(*store.k.shape[:3], -1), rows


def _kernel(*refs, described, in_order, first, group, width, page, scale, config):
    rows_ref, fresh_ref, *rest = refs
    split, number, request = (pl.program_id(axis) for axis in range(3))
    head = number
    if not in_order:
        heads_ref, *rest = rest
        head = heads_ref[number]
    rest = rest[1:] if config.splits > 1 else rest
    inputs = sum(2 + len(_lists(store)) for store, _ in described)
    out_ref, *pools = rest[inputs:]
    arrivals_ref, parts = None, ()  # of several programs that share a head: their outs and lses
    if config.splits > 1:
        arrivals_ref, outs_ref, lses_ref, *pools = pools
        parts = outs_ref, lses_ref
    at = begins = 0
    for index, (store, shape) in enumerate(described):
        k_ref, v_ref, held_ref, *lists = rest[at : at + 2 + len(_lists(store))]
        at, ends = at + 3 + len(lists), begins + len(store.heads)

        @pl.when((number >= begins) & (number < ends))
        def _(
            store=store,
            shape=shape,
            program=(split, head, number - begins, request),
            refs=(k_ref, v_ref, held_ref, lists, *pools[2 * index : 2 * index + 2]),
        ):
            _attend_store(
                store,
                shape,
                program,
                (rows_ref, fresh_ref, out_ref, parts),
                refs,
                first=first,
                group=group,
                width=width,
                page=page,
                scale=scale,
                config=config,
            )

        begins = ends
    if arrivals_ref is not None:

        @pl.when(is_last(arrivals_ref, (request, head), config.splits))
        def _():
            merge_parts(parts, out_ref, (request, head))


def _attend_store(
    store, shape, program, shared, refs, *, first, group, width, page, scale, config
) -> None:
    """One head of one store over one stretch; program: split, model's head, store's, request."""
    rows_ref, fresh_ref, out_ref, parts = shared
    k_ref, v_ref, held_ref, lists, *_ = refs
    split, head, local, request = program
    num_heads = out_ref.shape[1]
    held = held_ref[request] if store.held.ndim == 1 else held_ref[request, local]
    mine = (held >= 0) & (split == 0)
    padded = pl.next_power_of_2(width)
    rows = max(MIN_ROWS, pl.next_power_of_2(group))
    column = jnp.arange(padded)
    inside = (column < width) & mine
    q = load_query(rows_ref, (request,), head * group, group, rows, width).astype(k_ref.dtype)
    key, value = (
        pltriton.load(fresh_ref.at[request, place, column], mask=inside, other=0.0)
        for place in (first + head, first + num_heads + head)
    )
    # First of all, so that they are held in registers no longer.
    _write(store, shape, program, held, refs, key, value, mine=mine, page=page, width=width)
    logit = scale * jnp.sum(q.astype(jnp.float32) * key.astype(jnp.float32)[None, :], axis=1)
    carry = Carry(
        peak=jnp.where(mine, logit, -jnp.inf),
        total=jnp.where(mine, jnp.ones((rows,), jnp.float32), 0.0),
        out=jnp.broadcast_to(value.astype(jnp.float32)[None, :], (rows, padded)),
    )
    carry = softmax_over(
        q,
        k_ref,
        v_ref,
        _source(store, shape, local, held, lists, request, page),
        carry,
        split=split,
        at=None if isinstance(store, PageStore) else (request, local),
        pages=_length(store, shape),
        page=page,
        width=width,
        scale=scale,
        config=_half_blocks(config) if isinstance(store, PageStore) else config,
    )
    out, lse = normalized(carry)
    row = jnp.arange(rows)
    target_ref, at = out_ref, (request, head)
    if parts:
        target_ref, lse_ref = parts
        at = (split, *at)
        pltriton.store(lse_ref.at[(*at, row)], lse, mask=row < group)
    pltriton.store(
        target_ref.at[(*at, row[:, None], column[None, :])],
        out.astype(target_ref.dtype),
        mask=(row < group)[:, None] & (column < width)[None, :],
    )


def _half_blocks(config: TuningConfig) -> TuningConfig:
    """The same tokens in twice the steps: rows of pages take a register each for where they are."""
    if config.block_tokens == MIN_ROWS:
        return config
    half = config.block_tokens // 2
    return dataclasses.replace(config, block_tokens=half, steps=2 * config.steps)


def _write(store, shape, program, held, refs, key, value, *, mine, page, width) -> None:
    """The new token to its place.

    By one program only; the others do not count it, so it matters to none who comes first.
    """
    _, _, local, request = program
    _, _, _, lists, new_k_ref, new_v_ref = refs
    index, offset = held // page, held % page
    column = jnp.arange(key.shape[0])
    inside = (column < width) & mine
    if isinstance(store, PageStore):
        table_ref = lists[1]
        block = pltriton.load(table_ref.at[request, index], mask=mine, other=0)
        row = (block * shape[1] + local) * page + offset
        pltriton.store(new_k_ref.at[row, column], key, mask=inside)
        pltriton.store(new_v_ref.at[row, column], value, mask=inside)
        return
    slots = shape[2]
    slot = index
    if store.slot_page is not None:
        slot = find_slot(lists[0], request, local, index, slots=slots)
    inside &= (slot >= 0) & (slot < slots)
    place = slot * page + offset
    pltriton.store(new_k_ref.at[request, local, column, place], key, mask=inside)
    row = (request * shape[1] + local) * slots * page + place
    pltriton.store(new_v_ref.at[row, column], value, mask=inside)


def _length(store: Store, shape: tuple[int, ...]) -> int:
    return store.pages.shape[2] if isinstance(store, PageStore) else shape[2]


def _source(store, shape, local, held, lists, request, page):
    """What `softmax_over` asks of a listed page: tokens that count, and where its rows begin."""

    def source(index, listed):
        if isinstance(store, PageStore):
            pages_ref, table_ref = lists
            name = pltriton.load(pages_ref.at[request, local, index], mask=listed, other=-1)
            block = pltriton.load(
                table_ref.at[request, jnp.maximum(name, 0)], mask=name >= 0, other=0
            )
            stored = block * shape[1] + local
        else:
            stored = (request * shape[1] + local) * shape[2] + index
            name = index
            if store.slot_page is not None:
                name = pltriton.load(lists[0].at[request, local, index], mask=listed, other=-1)
        count = jnp.clip(held - name * page, 0, page)
        return jnp.where(listed & (name >= 0), count, 0), stored

    return source
