"""Decode attention over the stores of a layer against its oracle, poisoned where none may read."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels import dispatch
from flexijax.pallas_kernels.decode_attention import pallas, reference
from flexijax.pallas_kernels.sparse_decode.tuning import TuningConfig
from flexijax.pallas_kernels.stores import BankedStore, PageStore, SlotStore
from tests.kernel_cases import TOLERANCE, assert_rows_close, numpy_dtype


@dataclasses.dataclass(frozen=True)
class Case:
    """stores: of each a letter (pages, slots, dense, lengths of heads) and the heads."""

    name: str
    stores: tuple[tuple[str, tuple[int, ...]], ...]
    held: tuple[int, ...]
    dtype: str = "float32"
    query_dtype: str | None = None
    group: int = 3
    width: int = 16
    page: int = 4
    pages: int = 12

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("both", (("p", (0, 3)), ("s", (1, 2))), (0, 3, 4, 17, -1, 40)),
    Case("slots", (("s", (0, 1)),), (15, 16, 33)),
    Case("dense", (("d", (0, 1)),), (0, 7, -1, 47), group=1),
    Case("pages-bf16", (("p", (0,)),), (5, 31), "bfloat16", group=4, width=128, page=16, pages=3),
    Case("evicting", (("l", (1,)), ("d", (0,))), (9, 20), width=24),
    Case("two-dtypes", (("s", (1,)), ("p", (0,))), (21, 6), "bfloat16", "float32"),
)


def inputs(case):
    """q, k, v and stores of NumPy arrays: NaN in everything that no head holds."""
    rng = np.random.default_rng(len(case.name))
    batch, dtype = len(case.held), numpy_dtype(case.dtype)
    heads = sum(len(named) for _, named in case.stores)
    stores = tuple(
        _store(kind, named, case, np.array(case.held, np.int32), rng, dtype)
        for kind, named in case.stores
    )
    q = rng.normal(size=(batch, heads, case.group, case.width))
    k, v = rng.normal(size=(2, batch, heads, case.width)).astype(dtype)
    return q.astype(numpy_dtype(case.query_dtype or case.dtype)), k, v, stores


def _store(kind, named, case, held, rng, dtype):
    batch, count, page, pages = len(held), len(named), case.page, case.pages
    rows = np.full((batch, count, pages, page, case.width), np.nan)
    if kind == "l":
        held = np.where(held[:, None] < 0, -1, held[:, None] - np.arange(count) * 2)
    for row in range(batch):
        for head in range(count):
            tokens = int(held[row] if held.ndim == 1 else held[row, head])
            flat = rows[row, head].reshape(pages * page, -1)
            flat[: max(tokens, 0)] = 2 * rng.normal(size=(max(tokens, 0), case.width))
    values = np.where(np.isnan(rows), np.nan, rng.normal(size=rows.shape))
    if kind in "dl":
        slots = np.moveaxis(rows, 4, 2).astype(dtype), values.astype(dtype)
        return SlotStore(*slots, None, held, named)
    # Some of the full pages, and always the one that the new token goes to.
    chosen = np.full((batch, count, 6), -1, np.int32)
    for row, head in np.ndindex(batch, count):
        newest = max(int(held[row]), 0) // page
        older = rng.permutation(newest)[: rng.integers(0, 5)]
        mine = rng.permutation([newest, *older]) if held[row] >= 0 else []
        chosen[row, head, rng.permutation(6)[: len(mine)]] = mine
    if kind == "s":
        at = np.arange(batch)[:, None, None], np.arange(count)[None, :, None], chosen
        empty = (chosen < 0)[..., None, None]
        k, v = (np.where(empty, np.nan, x[at]).astype(dtype) for x in (rows, values))
        return SlotStore(np.moveaxis(k, 4, 2), v, chosen, held, named)
    table = rng.permutation(batch * pages + 3)[: batch * pages].reshape(batch, pages)
    pools = []
    for x in (rows, values):
        pool = np.full((batch * pages + 3, count, page, case.width), np.nan, dtype)
        pool[table] = x.swapaxes(1, 2)
        pools.append(pool)
    return PageStore(*pools, chosen, table.astype(np.int32), held, named)


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@functools.cache
def expected(case):
    return reference.decode_attention(*inputs(case), scale=case.width**-0.5)


def check(case, out, stores, _):
    wanted, kept = expected(case)
    assert out.dtype == (case.query_dtype or case.dtype)
    assert_rows_close(out, wanted, TOLERANCE[case.dtype])
    for store, (k, v) in zip(stores, kept, strict=True):
        for got, want in ((store.k, k), (store.v, v)):
            # As float32, since NumPy finds no NaN in bfloat16.
            np.testing.assert_array_equal(np.asarray(got, np.float32), want.astype(np.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_in_arrays_of_their_own_are_as_rows_of_one(case):
    """Of a row each, the last of them after all others."""
    q, k, v, stores = on_device(inputs(case))

    def banked(store):
        if isinstance(store, PageStore):
            return store
        apart = (tuple(x[row : row + 1] for row in range(len(x))) for x in (store.k, store.v))
        return BankedStore(*apart, store.slot_page, store.held, store.heads)

    def joined(store):
        if isinstance(store, PageStore):
            return store
        k, v = map(jnp.concatenate, (store.k, store.v))
        return SlotStore(k, v, store.slot_page, store.held, store.heads)

    out, made, arrivals = dispatch.decode_attention(
        q, k, v, tuple(map(banked, stores)), scale=case.width**-0.5, implementation="xla"
    )
    check(case, out, tuple(map(joined, made)), arrivals)


def test_rows_in_several_banks_are_not_for_kernels_of_a_gpu():
    case = CASES[2]
    q, k, v, [store] = on_device(inputs(case))
    banks = BankedStore(
        (store.k[:2], store.k[2:]), (store.v[:2], store.v[2:]), None, store.held, (0, 1)
    )
    with pytest.raises(ValueError, match="implementation='xla'"):
        dispatch.decode_attention(q, k, v, (banks,), scale=1.0, implementation="pallas")
    uneven = dataclasses.replace(banks, k=(store.k[:1], store.k[1:]))
    with pytest.raises(ValueError, match="k0"):
        dispatch.decode_attention(q, k, v, (uneven,), scale=1.0, implementation="xla")


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_and_what_is_kept(case, implementation):
    run = functools.partial(
        dispatch.decode_attention, scale=case.width**-0.5, implementation=implementation
    )
    check(case, *jax.jit(run)(*on_device(inputs(case))))


@pytest.mark.parametrize("splits", [3, 9])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_several_parts_are_merged(case, splits):
    """By the last program of a head; the new token is in one part only, and parts may be empty."""
    config = TuningConfig(16, -(-case.page * case.pages // 16 // splits), splits, 1, 1)
    run = functools.partial(pallas.decode_attention, scale=case.width**-0.5, config=config)
    q, k, v, stores = on_device(inputs(case))
    arrivals = jnp.zeros(k.shape[:2], jnp.int32)
    out, kept, arrivals = jax.jit(run)(q, k, v, stores, arrivals)
    check(case, out, kept, arrivals)
    # As the next layer wants them.
    assert not np.asarray(arrivals).any()


def test_who_has_not_been_waited_for_is_not_merged():
    """With one arrival counted beforehand the last part comes too late, and out is not right."""
    case = CASES[0]
    config = TuningConfig(16, 1, 3, 1, 1)
    run = functools.partial(pallas.decode_attention, scale=case.width**-0.5, config=config)
    q, k, v, stores = on_device(inputs(case))
    out, kept, arrivals = jax.jit(run)(q, k, v, stores, jnp.ones(k.shape[:2], jnp.int32))
    assert (np.asarray(arrivals) == 1).all()
    with pytest.raises(AssertionError):
        check(case, out, kept, arrivals)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zeros_would_fail(case):
    wanted, kept = expected(case)
    assert np.isfinite(wanted).all()
    with pytest.raises(AssertionError):
        assert_rows_close(np.zeros_like(wanted), wanted, TOLERANCE[case.dtype])
    before = inputs(case)[3]
    assert not np.array_equal(before[0].v, kept[0][1], equal_nan=True)


def test_bad_arguments_are_named():
    q, k, v, stores = on_device(inputs(CASES[0]))
    call = functools.partial(dispatch.decode_attention, scale=0.25)
    with pytest.raises(ValueError, match=r"stores name heads \[0, 3\]"):
        call(q, k, v, stores[:1])
    with pytest.raises(ValueError, match="stores' dtype float32, got bfloat16"):
        call(q, k.astype(jnp.bfloat16), v.astype(jnp.bfloat16), stores)
    with pytest.raises(ValueError, match="held must be int32"):
        call(q, k, v, (stores[0], dataclasses.replace(stores[1], held=jnp.zeros(6))))
    with pytest.raises(ValueError, match="differ in page size"):
        call(q, k, v, (stores[0], dataclasses.replace(stores[1], k=stores[1].k[..., :2])))
    with pytest.raises(ValueError, match=r"arrivals.*shape \(6, 2\), but K is 4"):
        call(q, k, v, stores, jnp.zeros((6, 2), jnp.int32))
    with pytest.raises(ValueError, match="scale must be positive"):
        call(q, k, v, stores, scale=-1.0)
