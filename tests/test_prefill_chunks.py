"""How many tokens of a prompt are read at once."""

import pytest

from flexijax.cache.prefill_kv import chunk_size
from flexijax.engine.plan import bucket
from flexijax.pallas_kernels.tiling import largest_divisor


@pytest.mark.parametrize(
    ("room", "prompt", "chunk"),
    [(8192, 5000, 1024), (8192, 64, 64), (1280, 81, 640), (1280, 80, 80), (1408, 999, 704)],
)
def test_one_of_two_sizes(room, prompt, chunk):
    assert chunk_size(room, prompt) == chunk


def test_every_room_is_read_in_few_chunks():
    """Rooms as `bucket` makes them: none is read in pieces of less than half of what could be."""
    for pages in range(1, 8192):
        room = 16 * bucket(pages)
        chunk = chunk_size(room, room)
        assert room % chunk == 0 and chunk > min(room, 1024) // 2
        assert len({chunk_size(room, prompt) for prompt in range(1, room, 7)}) <= 2


@pytest.mark.parametrize(
    ("size", "limit", "piece"), [(1280, 512, 320), (7, 5, 1), (8, 8, 8), (3, 9, 3), (1, 1, 1)]
)
def test_the_greatest_divisor_within_a_limit(size, limit, piece):
    assert largest_divisor(size, limit) == piece
