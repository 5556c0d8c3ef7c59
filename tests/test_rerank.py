"""The scheduler step on cases small enough to be worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.pallas_kernels.filled import filled_pages, find_slots
from flexijax.pallas_kernels.rerank import plan_rerank

# name, chosen, slots, tokens held, held at the last rerank, -> slots afterwards, load, promoted,
# overlap, RCO. Pages of 4 tokens, 12 pages. Incoming pages take the freed slots in ascending order,
# then those that begin next. RCO does not count pages that began since the last rerank.
NAN = float("nan")
CASES = (
    # Page 9 began after token 30: of three chosen pages only page 0 was chosen before, of 10 pages.
    (
        "docstring",
        (0, 3, 9),
        (0, 1, 9, 2),
        38,
        30,
        (0, 3, 9, 10),
        (-1, 3, -1, -1),
        1,
        2 / 3,
        1 / 21,
    ),
    ("nothing changes", (9, 0, 3), (0, 3, 9, -1), 38, 37, (0, 3, 9, 10), (-1,) * 4, 0, 1.0, 1.0),
    (
        "all change",
        (0, 4, 9),
        (1, 2, 3, 9),
        40,
        37,
        (0, 4, 10, 9),
        (0, 4, -1, -1),
        2,
        1 / 3,
        1 / 21,
    ),
    # Page 10 was reserved for a page to begin, and has not begun: it is not resident, only named.
    (
        "reserved",
        (0, 2, 9),
        (0, 10, 9, 11),
        40,
        39,
        (0, 2, 9, 10),
        (-1, 2, -1, -1),
        1,
        2 / 3,
        11 / 21,
    ),
    # Page 10 began in its reserved slot: it is resident, and the newest, but was not chosen before.
    ("began", (0, 2, 10), (0, 2, 9, 10), 41, 37, (0, 2, 11, 10), (-1,) * 4, 0, 1.0, 13 / 24),
    ("short request", (0, -1, -1), (0, 1, 2, 3), 3, 1, (0, 1, 2, 3), (-1,) * 4, 0, 1.0, NAN),
    ("empty slots", (0, 1, 2), (-1, -1, -1, -1), 10, 0, (0, 1, 2, 3), (0, 1, 2, -1), 3, 0.0, NAN),
    (
        "last page",
        (0, 2, 11),
        (0, 1, 10, 11),
        46,
        45,
        (0, 2, -1, 11),
        (-1, 2, -1, -1),
        1,
        2 / 3,
        5 / 9,
    ),
    ("free row", (-1, -1, -1), (0, 1, 9, 2), 0, 0, (-1,) * 4, (-1,) * 4, 0, 0.0, NAN),
)


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_plan_by_hand(case):
    _, chosen, slots, length, since, expected, load, promoted, overlap, rco = case
    plan = plan_rerank(
        jnp.asarray([[chosen]]),
        jnp.asarray([[slots]]),
        jnp.asarray([length], jnp.int32),
        jnp.asarray([[since]], jnp.int32),
        pages=12,
        page_size=4,
    )
    assert tuple(plan.slot_page[0, 0].tolist()) == expected
    assert tuple(plan.load[0, 0].tolist()) == load
    assert plan.promoted.tolist() == [[promoted]]
    np.testing.assert_allclose(plan.overlap, [[overlap]], rtol=1e-6)
    np.testing.assert_allclose(plan.rco, [[rco]], rtol=1e-5)


def test_heads_and_rows_do_not_disturb_each_other():
    chosen = jnp.asarray([[case[1] for case in CASES], [case[1] for case in CASES[::-1]]])
    slots = jnp.asarray([[case[2] for case in CASES[:1]] * len(CASES)] * 2)
    lengths = jnp.asarray([38, 40], jnp.int32)
    since = jnp.asarray(np.arange(2 * len(CASES)).reshape(2, -1) + 20, jnp.int32)
    together = plan_rerank(chosen, slots, lengths, since, pages=12, page_size=4)
    for row in range(2):
        for head in range(len(CASES)):
            alone = plan_rerank(
                chosen[row : row + 1, head : head + 1],
                slots[row : row + 1, head : head + 1],
                lengths[row : row + 1],
                since[row : row + 1, head : head + 1],
                pages=12,
                page_size=4,
            )
            np.testing.assert_array_equal(together.slot_page[row, head], alone.slot_page[0, 0])
            np.testing.assert_array_equal(together.load[row, head], alone.load[0, 0])
            assert together.promoted[row, head] == alone.promoted[0, 0]
            np.testing.assert_array_equal(together.rco[row, head], alone.rco[0, 0])
    assert len(np.unique(together.rco)) > 3


@pytest.mark.parametrize(
    ("before", "after", "pages"),
    [(0, 3, (-1, -1)), (3, 4, (0, -1)), (3, 8, (0, 1)), (4, 7, (-1, -1)), (5, 12, (1, 2))],
)
def test_pages_that_filled_up(before, after, pages):
    got = filled_pages(
        jnp.asarray([before], jnp.int32), jnp.asarray([after], jnp.int32), page_size=4, count=2
    )
    assert tuple(got[0].tolist()) == pages


def test_an_ended_row_fills_no_page():
    """A row that ended counts as 0 tokens afterwards."""
    got = filled_pages(
        jnp.asarray([9], jnp.int32), jnp.asarray([0], jnp.int32), page_size=4, count=2
    )
    assert got.tolist() == [[-1, -1]]


def test_slots_of_a_page():
    slots = jnp.asarray([[[4, 7, -1], [7, 5, 4]], [[0, 1, 2], [2, 1, -1]]])
    got = find_slots(slots, jnp.asarray([[7, 9], [2, 0]], jnp.int32))
    assert got.tolist() == [[[1, -1], [0, -1]], [[2, 0], [0, -1]]]
    empty = find_slots(slots, jnp.full((2, 1), -1, jnp.int32))
    assert empty.tolist() == [[[-1], [-1]], [[-1], [-1]]], "an empty slot holds no page"
