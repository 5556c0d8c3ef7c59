"""The block allocator: every block is free or counted, and an error changes nothing."""

import random

import pytest

from flexijax.cache.blocks import BlockAllocator

pytestmark = pytest.mark.any_jax


def test_hands_out_every_block_once():
    allocator = BlockAllocator(5)
    blocks = allocator.allocate(3) + allocator.allocate(2)
    assert sorted(blocks) == [0, 1, 2, 3, 4]
    assert allocator.num_free == 0
    assert allocator.can_allocate(0) and not allocator.can_allocate(1)


def test_released_blocks_are_handed_out_again():
    allocator = BlockAllocator(3)
    blocks = allocator.allocate(3)
    allocator.release(blocks[:2])
    assert sorted(allocator.allocate(2)) == sorted(blocks[:2])


def test_shared_block_is_free_only_after_its_last_reference():
    allocator = BlockAllocator(2)
    blocks = allocator.allocate(2)
    allocator.share(blocks[:1])
    allocator.release(blocks)
    assert allocator.num_free == 1
    assert [allocator.references(block) for block in blocks] == [1, 0]
    allocator.release(blocks[:1])
    assert allocator.num_free == 2


def test_too_many_are_refused_and_nothing_is_taken():
    allocator = BlockAllocator(4)
    allocator.allocate(1)
    with pytest.raises(ValueError, match="4 blocks asked for, 3 of them free"):
        allocator.allocate(4)
    with pytest.raises(ValueError, match="-1 blocks"):
        allocator.allocate(-1)
    assert allocator.num_free == 3


@pytest.mark.parametrize("action", ["share", "release"])
@pytest.mark.parametrize("bad", [2, 3, -1, 4])
def test_block_not_in_use_is_refused_and_nothing_is_counted(action, bad):
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    assert sorted(blocks) == [0, 1]
    with pytest.raises(ValueError, match=f"block {bad} is not in use"):
        getattr(allocator, action)([0, bad])
    allocator.release(blocks)
    assert allocator.num_free == 4


def test_one_reference_cannot_be_given_back_twice():
    allocator = BlockAllocator(1)
    blocks = allocator.allocate(1)
    with pytest.raises(ValueError, match="block 0 is not in use 2 times"):
        allocator.release(blocks * 2)
    allocator.release(blocks)
    with pytest.raises(ValueError, match="block 0 is not in use 1 times"):
        allocator.release(blocks)


@pytest.mark.parametrize("count", [0, -3])
def test_an_empty_pool_is_refused(count):
    with pytest.raises(ValueError, match=f"num_blocks={count}"):
        BlockAllocator(count)


def test_random_use_agrees_with_a_count_per_block():
    rng, allocator, counts = random.Random(0), BlockAllocator(12), [0] * 12
    for _ in range(500):
        used = [block for block, count in enumerate(counts) if count]
        action = rng.choice(("allocate", "share", "release"))
        if action == "allocate":
            count = rng.randint(0, 12 - len(used))
            taken = allocator.allocate(count)
            assert len(set(taken)) == count and not set(taken) & set(used)
        else:
            taken = rng.sample(used, rng.randint(0, len(used)))
            getattr(allocator, action)(taken)
        for block in taken:
            counts[block] += -1 if action == "release" else 1
        assert allocator.num_free == counts.count(0)
