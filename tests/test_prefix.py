"""Prefix reuse: what is found is what was read, and nothing is lost to the pool."""

import hashlib

import pytest

from flexijax.cache.blocks import BlockAllocator
from flexijax.cache.prefix import PrefixIndex, block_hashes

pytestmark = pytest.mark.any_jax

PAGE = 4


def make_index(num_blocks=16, **sizes):
    return PrefixIndex(BlockAllocator(num_blocks), page_size=PAGE, **sizes)


def read(index, tokens, salt=""):
    """A prompt that is admitted and read: its blocks."""
    found = index.match(tokens, salt)
    index.acquire(found, len(tokens))
    blocks = found + index.allocate(-(-len(tokens) // PAGE) - len(found))
    index.insert(tokens, blocks, salt)
    return blocks


def test_a_second_prompt_finds_the_full_pages_that_both_begin_with():
    index = make_index()
    first = read(index, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert index.match([1, 2, 3, 4, 5, 6, 7, 8, 0, 0]) == first[:2]
    assert index.match([1, 2, 3, 4, 0, 6, 7, 8, 9]) == first[:1]
    assert index.match([0, 2, 3, 4, 5, 6, 7, 8, 9]) == []


def test_hashes_that_the_caller_kept_give_the_same_answer():
    index, tokens = make_index(), list(range(12))
    blocks = read(index, tokens, "mine")
    hashes = list(block_hashes(tokens, page_size=PAGE, salt="mine"))
    assert len(hashes) == 3
    assert index.match(tokens, "mine", hashes=hashes) == blocks[:2]
    assert index.match(tokens, "yours", hashes=hashes) == []


@pytest.mark.parametrize(("length", "found"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2), (11, 2)])
def test_at_least_one_token_is_left_to_compute(length, found):
    index, tokens = make_index(), list(range(11))
    blocks = read(index, tokens)
    assert index.match(tokens[:length]) == blocks[:found]


def test_a_page_that_is_not_full_is_not_shared():
    index = make_index()
    read(index, [1, 2, 3, 4, 5, 6])
    assert index.num_cached == 1
    assert len(index.match([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 1


def test_hits_are_rounded_down_to_the_grid_and_short_ones_are_none():
    index, tokens = make_index(grid=8, fewest=16), list(range(30))
    blocks = read(index, tokens)
    assert len(index.match(tokens)) == 6  # 7 full pages are known, 28 tokens
    assert index.match(tokens[:21]) == blocks[:4]  # 20 tokens are known, 16 on the grid
    assert index.match(tokens[:16]) == []  # 12 known, 8 on the grid: fewer than 16


def test_salts_do_not_share():
    index, tokens = make_index(), list(range(9))
    mine = read(index, tokens, "mine")
    assert index.match(tokens, "yours") == index.match(tokens) == []
    yours = read(index, tokens, "yours")
    assert not set(mine) & set(yours)
    assert index.match(tokens, "mine") == mine[:2]


def test_the_same_page_after_other_pages_is_another_block():
    index = make_index()
    read(index, [1, 1, 1, 1, 2, 2, 2, 2, 0])
    assert index.match([2, 2, 2, 2, 0]) == []
    assert len(index.match([1, 1, 1, 1, 1, 1, 1, 1, 0])) == 1


def test_each_hash_is_of_parent_page_and_salt():
    """The formula, written out: fixed lengths before the salt, so that no two inputs are alike."""
    page = b"".join(token.to_bytes(8, "little", signed=True) for token in (7, 8, 9, 10))
    first = hashlib.sha256(bytes(32) + page + "päge".encode()).digest()
    second = hashlib.sha256(first + page + "päge".encode()).digest()
    found = block_hashes([7, 8, 9, 10] * 2 + [7], page_size=PAGE, salt="päge")
    assert list(found) == [first, second]


def test_colliding_hashes_alias_neither_salts_nor_parents(monkeypatch):
    """Pages are found below their parent, and chains below their salt, whatever the hashes say."""

    class Always:
        def __init__(self, *_):
            pass

        def digest(self):
            return bytes(32)

    monkeypatch.setattr("flexijax.cache.prefix.sha256", Always)
    index, tokens = make_index(), list(range(9))
    blocks = read(index, tokens, "mine")
    assert index.match(tokens, "yours") == []
    assert index.match(tokens, "mine") == blocks[:2]  # every page collides: still two blocks


def test_blocks_stay_known_after_their_request_and_count_as_free():
    index, tokens = make_index(4), list(range(9))
    blocks = read(index, tokens)
    assert (index.num_free, index.num_cached) == (1, 2)
    index.release(blocks)
    assert (index.num_free, index.num_cached) == (4, 2)
    assert index.match(tokens) == blocks[:2]
    assert index.can_allocate(4) and not index.can_allocate(5)
    assert sorted(index.allocate(4)) == [0, 1, 2, 3]
    assert index.match(tokens) == [] and index.counts.evicted == 2


def test_the_least_recently_used_chain_goes_first_and_ends_first():
    index = make_index(7)
    old, new = [1] * 13, [2] * 13  # 3 full pages each, and one that is not
    for tokens in (old, new):
        index.release(read(index, tokens))
    index.release(index.allocate(2))
    assert (len(index.match(old)), len(index.match(new))) == (2, 3)
    index.release(index.allocate(4))
    assert (len(index.match(old)), len(index.match(new))) == (0, 3)
    index.release(read(index, old))
    assert (len(index.match(old)), len(index.match(new))) == (3, 3)
    index.release(index.allocate(2))
    assert (len(index.match(old)), len(index.match(new))) == (3, 2)


def test_use_over_and_over_leaves_neither_a_trace_nor_a_wrong_order():
    index = make_index(7)
    old, new = [1] * 13, [2] * 13
    for _ in range(50):
        for tokens in (new, old, new):
            index.release(read(index, tokens))
    assert len(index._ends) <= 2 * 7
    index.release(index.allocate(3))
    assert (len(index.match(old)), len(index.match(new))) == (1, 3)


def test_what_a_request_holds_is_not_evicted():
    index = make_index(4)
    held = read(index, [1] * 5)
    index.release(read(index, [2] * 5))
    index.allocate(2)
    assert index.match([1] * 5) == held[:1] and index.match([2] * 5) == []
    with pytest.raises(ValueError, match="1 blocks asked for, 0 of them free"):
        index.allocate(1)


def test_a_page_above_one_that_is_held_gives_way_and_its_end_is_forgotten_first():
    """Two read the same page at once; the second went on below the first's block."""
    index = make_index(4)
    one, two = index.allocate(1), index.allocate(2)
    index.insert([1] * 4, one)
    index.insert([1] * 8, two)
    assert index.match([1] * 9) == [one[0], two[1]]
    index.release(one)
    assert index.num_free == 2  # the one that was never used, and the first's
    assert set(index.allocate(2)) == {3, one[0]}
    assert index.match([1] * 9) == [] and index.num_cached == 0
    index.release(two)
    assert index.num_free == 2


def test_all_can_be_forgotten_at_once_and_what_is_held_stays_held():
    index = make_index(num_blocks=8)
    index.release(read(index, list(range(9))))
    held = read(index, list(range(5)), "mine")
    index.forget_all()
    assert index.match(list(range(9))) == index.match(list(range(9)), "mine") == []
    assert (index.num_cached, index.num_free) == (0, 8 - len(held))
    index.release(held)
    assert sorted(index.allocate(8)) == list(range(8))


def test_hits_and_misses_are_counted_when_a_request_takes_them():
    index, tokens = make_index(), list(range(9))
    read(index, tokens)
    for _ in range(3):
        index.match(tokens)  # looking is free
    read(index, tokens)
    counts = index.counts
    assert (counts.misses, counts.hits, counts.hit_tokens, counts.prompt_tokens) == (1, 1, 8, 18)
    assert counts.evicted == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"page_size": 0}, "page_size=0 must be at least 1"),
        ({"page_size": 4, "grid": 6}, "grid=6 must be a multiple of page_size=4"),
        ({"page_size": 4, "grid": 0}, "grid=0"),
        ({"page_size": 4, "fewest": -1}, "fewest=-1"),
    ],
)
def test_wrong_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        PrefixIndex(BlockAllocator(4), **sizes)


def test_wrong_blocks_are_refused_and_nothing_changes():
    index, tokens = make_index(4), [1] * 9
    blocks = index.allocate(2)
    with pytest.raises(ValueError, match="2 full pages of 4 tokens, and 1 blocks"):
        index.insert(tokens, blocks[:1])
    with pytest.raises(ValueError, match="block 3 is not in use"):
        index.insert(tokens, [blocks[0], 3])
    with pytest.raises(ValueError, match="holds other tokens"):
        index.insert(tokens, [blocks[0]] * 2)
    index.insert(tokens, blocks)
    with pytest.raises(ValueError, match="holds other tokens"):
        index.insert([2] * 9, blocks)
    index.release(blocks)
    with pytest.raises(ValueError, match="block 0 is not in use 1 times"):
        index.release(blocks)  # the index's own reference is not a request's to give back
    assert index.num_free == 4 and index.match(tokens) == blocks
