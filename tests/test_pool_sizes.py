"""Rows and blocks from bytes: by hand, against trying every number, and refused with the sum."""

import hypothesis
import pytest
from hypothesis import strategies as st

from flexijax.engine.byte_counts import byte_count, in_words
from flexijax.engine.pool_sizes import PoolSizes, TierBytes, pool_sizes

pytestmark = pytest.mark.any_jax

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (1, 1),
        ("4096", 4096),
        ("1GiB", GIB),
        ("1.5 gib", 3 * GIB // 2),
        (" 512MiB ", 512 * MIB),
        ("80GB", 80 * 10**9),
        ("3 kB", 3000),
        ("2TiB", 2 << 40),
        ("9007199254740993B", 9007199254740993),
    ],
)
def test_bytes_as_people_write_them(said, meant):
    assert byte_count("device_bytes", said) == meant


@pytest.mark.parametrize(
    "said", [0, -1, 1.5, True, None, "", "GiB", "1 gig", "-1GiB", "1e9", "0.1B"]
)
def test_what_is_no_amount_is_refused_by_name(said):
    with pytest.raises(ValueError, match="device_bytes=.* must be bytes"):
        byte_count("device_bytes", said)


def test_bytes_in_messages():
    assert [in_words(count) for count in (300, 1536, 5 * MIB, 3 * GIB // 2)] == [
        "300 bytes",
        "1.50 KiB",
        "5.00 MiB",
        "1.50 GiB",
    ]


def test_all_that_the_budget_leaves_is_blocks():
    """100 once, 3 rows of 20, then 440 bytes in blocks of 4; the host has room for 130."""
    device = TierBytes(block=4, row=20, once={"staging": 70, "tables": 30})
    sizes = {"device_bytes": 600, "max_requests": 3, "max_context": 100, "page_size": 4}
    host = TierBytes(block=10, row=0)
    assert pool_sizes(device, host, host_bytes=1300, **sizes) == PoolSizes(
        rows=3, blocks=110, device_bytes=600, host_bytes=1100
    )
    assert pool_sizes(device, host, host_bytes=1009, **sizes) == PoolSizes(
        rows=3, blocks=100, device_bytes=560, host_bytes=1000
    )


def test_rows_that_would_have_no_blocks_are_not_made():
    """A request of 100 tokens takes 20 + 25 * 4 bytes: 500 bytes hold four, with 20 over."""
    tiers = TierBytes(block=4, row=20), TierBytes(block=0, row=0)
    sizes = {"device_bytes": 500, "host_bytes": 1, "max_context": 100, "page_size": 4}
    made = pool_sizes(*tiers, max_requests=64, **sizes)
    assert (made.rows, made.blocks) == (4, 105)
    made = pool_sizes(*tiers, max_requests=64, usual_context=20, **sizes)
    assert (made.rows, made.blocks) == (12, 65)  # 20 + 5 * 4 bytes each


def test_where_blocks_take_nothing_every_row_has_its_own():
    """A policy that evicts keeps tokens in rows alone."""
    tiers = TierBytes(block=0, row=20), TierBytes(block=0, row=0)
    made = pool_sizes(
        *tiers, device_bytes=100, host_bytes=1, max_requests=8, max_context=9, page_size=4
    )
    assert made == PoolSizes(rows=5, blocks=15, device_bytes=100, host_bytes=0)


def test_too_little_is_refused_with_what_takes_how_much():
    device = TierBytes(block=MIB, row=64 * MIB, once={"staging": 512 * MIB, "tables": 300})
    host = TierBytes(block=3 * MIB, row=0)
    with pytest.raises(ValueError) as error:
        pool_sizes(
            device,
            host,
            device_bytes=GIB,
            host_bytes=GIB,
            max_requests=8,
            max_context=16384,
            page_size=16,
        )
    assert str(error.value) == (
        "device_bytes=1073741824 (1.00 GiB) is too little for one request of max_context=16384 "
        "tokens: 512.00 MiB of staging + 300 bytes of tables + 64.00 MiB of slots + 1024 blocks of "
        "1.00 MiB = 1.56 GiB; raise device_bytes, or lower max_context; "
        "host_bytes=1073741824 (1.00 GiB) is too little for one request of max_context=16384 "
        "tokens: 1024 blocks of 3.00 MiB = 3.00 GiB; raise host_bytes, or lower max_context"
    )


TIERS = st.builds(
    TierBytes,
    block=st.integers(0, 4),
    row=st.integers(0, 9),
    once=st.dictionaries(st.sampled_from(["staging", "tables"]), st.integers(0, 20)),
)


@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
    device=TIERS,
    host=TIERS,
    budgets=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    wanted=st.integers(1, 6),
    context=st.integers(1, 20),
    usual=st.one_of(st.none(), st.integers(1, 20)),
)
def test_no_other_number_of_rows_or_blocks_is_better(device, host, budgets, wanted, context, usual):
    """Every number tried, the most rows first."""

    def fits(rows, blocks):
        return all(
            sum(tier.once.values()) + rows * tier.row + blocks * tier.block <= budget
            for tier, budget in zip((device, host), budgets, strict=True)
        )

    longest, each = -(-context // 4), -(-min(context, usual or context) // 4)
    best = next(
        (
            rows
            for rows in range(wanted, 0, -1)
            if fits(rows, max(longest, rows * each if rows > 1 else 0))
        ),
        None,
    )
    arguments = {
        "device_bytes": budgets[0],
        "host_bytes": budgets[1],
        "max_requests": wanted,
        "max_context": context,
        "page_size": 4,
        "usual_context": usual,
    }
    if best is None:
        with pytest.raises(ValueError, match="is too little"):
            pool_sizes(device, host, **arguments)
        return
    made = pool_sizes(device, host, **arguments)
    assert made.rows == best
    assert fits(made.rows, made.blocks)
    if device.block or host.block:
        assert not fits(made.rows, made.blocks + 1)
    else:
        assert made.blocks == made.rows * longest
