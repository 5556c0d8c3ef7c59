"""Grants of blocks against every order in which requests could end."""

import dataclasses
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from flexijax.engine.boundary import Limits, RequestState, Stage
from flexijax.engine.safety import BlockLedger
from tests.safe_orders import can_all_end

pytestmark = pytest.mark.any_jax

LIMITS = Limits(blocks=10, rows=5, page_size=1)


def holding(key, blocks, needs, cached=None):
    """One that holds blocks of a token each, and may need so many more; or waits, with a token more
    than is cached."""
    return RequestState(
        key=key,
        arrival=key,
        prompt_tokens=len(blocks) if cached is None else len(cached) + 1,
        max_new_tokens=needs,
        stage=Stage.RUNNING,
        blocks=tuple(blocks),
        cached=tuple(cached or ()),
    )


def ledger_of(*requests, blocks=10):
    return BlockLedger(dataclasses.replace(LIMITS, blocks=blocks), requests, ())


def test_a_grant_is_safe_while_somebody_can_end_with_what_is_left():
    """7 of 10 blocks are held; the first may need 3 more, the second 6."""
    ledger = ledger_of(holding(1, range(4), 3), holding(2, range(4, 7), 6))
    assert not ledger.grow(2, 1)  # 2 left: neither 3 nor 5 more
    assert ledger.grow(1, 1)  # 2 left are enough for the first, and 7 then for the second
    assert ledger.free == 2


def test_more_than_is_free_is_never_granted():
    ledger = ledger_of(holding(1, range(4), 6))
    assert not ledger.grow(1, 7)
    assert ledger.grow(1, 6)


def test_shared_blocks_count_once_and_come_free_with_their_last_holder():
    """Both hold the same 8 blocks; 2 are free."""
    mine, other = holding(1, range(8), 1), holding(2, range(8), 2)
    assert ledger_of(mine, other).free == 2
    assert ledger_of(mine, other).grow(2, 1)
    # The first's end gives back what it takes and no shared block.
    assert not ledger_of(mine, holding(2, range(8), 3)).grow(1, 1)


def test_an_admission_takes_from_the_free_ones_what_is_cached_and_held_by_nobody():
    first = holding(1, range(4), 1)
    held = holding(2, (), 1, cached=(0, 1))  # the first's
    idle = holding(3, (), 1, cached=(8, 9))
    for request, taken in ((held, 1), (idle, 3)):
        ledger = BlockLedger(LIMITS, [first], [held, idle])
        assert ledger.admit(request)
        assert ledger.free == 6 - taken


def test_a_refused_admission_leaves_no_trace():
    """Had it got them, the first's end would give none of its 6 blocks back."""
    first, second = holding(1, range(6), 1), holding(2, [6], 8)
    sharing = holding(3, (), 3, cached=range(6))
    ledger = BlockLedger(LIMITS, [first, second], [sharing])
    assert not ledger.admit(sharing)  # 2 would be free, 3 and 8 needed once the first has ended
    assert ledger.free == 3
    assert ledger.grow(2, 1)


IDS = st.sets(st.integers(0, 7), max_size=5)


@hypothesis.settings(deadline=None, max_examples=400)
@hypothesis.given(
    blocks=st.integers(6, 12),
    held=st.lists(st.tuples(IDS, st.integers(0, 6)), max_size=3),
    cached=st.lists(st.tuples(IDS, st.integers(1, 6)), max_size=2),
    grants=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=6),
)
def test_every_answer_is_that_of_all_orders(blocks, held, cached, grants):
    """Any sequence of grants; a refused one leaves no trace, or the next answers would differ."""
    admitted = [holding(key, sorted(ids), needs) for key, (ids, needs) in enumerate(held)]
    start = len(admitted)
    waiting = [
        holding(key, (), needs, cached=sorted(ids))
        for key, (ids, needs) in enumerate(cached, start)
    ]
    hypothesis.assume(len(set().union(*(ids for ids, _ in held))) <= blocks)
    ledger = BlockLedger(dataclasses.replace(LIMITS, blocks=blocks), admitted, waiting)
    fresh = itertools.count(100)
    model = {request.key: (set(request.blocks), request.max_new_tokens) for request in admitted}

    def expect(answer, key, ids, needs):
        trial = model | {key: (ids, needs)}
        assert answer == can_all_end(blocks, list(trial.values()))
        if answer:
            model.update(trial)
            assert ledger.free == blocks - len(set().union(*(ids for ids, _ in model.values())))

    for request in waiting:
        ids = {*request.cached, next(fresh)}  # a token that is not cached, in a block of its own
        expect(ledger.admit(request), request.key, ids, request.max_new_tokens)
        for key, count in grants:
            if key in model and count <= model[key][1]:
                ids, needs = model[key]
                more = {next(fresh) for _ in range(count)}
                expect(ledger.grow(key, count), key, ids | more, needs - count)
