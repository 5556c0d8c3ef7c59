"""In what pieces a prompt is read, and that nothing of it depends on what runs beside it."""

import dataclasses

import numpy as np
import pytest

from flexijax.cache.prefill_kv import last_pieces, pieces
from flexijax.config import CacheConfig
from flexijax.engine.plan import bucket, make_program
from flexijax.engine.prefiller import Prefiller
from flexijax.engine.program import Runner
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.tiling import largest_divisor
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def spec_of(lm, *, max_tokens: int):
    cache = CacheConfig(policy="full", page_size=4, budget_tokens=32)
    return make_program(lm, cache, max_tokens=max_tokens).prefill_spec()


@pytest.mark.parametrize(
    ("length", "wanted"),
    [
        (1, [(0, 64)]),
        (64, [(0, 64)]),
        (65, [(0, 64), (64, 64)]),
        (256, [(0, 256)]),
        (600, [(0, 256), (256, 256), (512, 64), (576, 64)]),
        (384, [(0, 256), (256, 64), (320, 64)]),
        (385, [(0, 256), (256, 256)]),
        (129, [(0, 256)]),
    ],
)
def test_chunks_then_tails(lm, length, wanted):
    found = [(piece.start, piece.size) for piece in pieces(spec_of(lm, max_tokens=1200), length)]
    assert found == wanted


def test_every_prompt_is_covered_once_by_two_sizes(lm):
    """And by the same pieces whatever there is room for; they stay within the room."""
    roomy = spec_of(lm, max_tokens=4000)
    for length in range(1, 2000, 37):
        spec = spec_of(lm, max_tokens=length + 1)
        found = list(pieces(spec, length))
        assert [piece.start for piece in found] == [
            sum(piece.size for piece in found[:at]) for at in range(len(found))
        ]
        last = found[-1]
        assert last.start < length <= last.start + last.size <= spec.tokens
        assert {piece.size for piece in found} <= {spec.chunk, spec.tail}
        same = [(piece.start, piece.size) for piece in pieces(roomy, length)]
        assert same == [(piece.start, piece.size) for piece in found]


def test_keys_behind_a_piece_are_not_looked_at_where_that_costs(lm):
    """On a GPU, whose attention takes all keys that it is given."""
    with platform.compiling_for("gpu"):
        spec = spec_of(lm, max_tokens=32768)
    assert spec.key_lengths == (8192, 16384, 24576, 32768)
    for piece in pieces(spec, 30000):
        end = piece.start + piece.size
        assert end <= piece.keys < end + 8192


def test_every_piece_of_any_prompt_is_among_those_compiled_ahead(lm):
    """Prompts that end below the longest have tails that look at fewer keys."""
    for device, tokens in (("cpu", 1200), ("cpu", 60), ("gpu", 9000), ("gpu", 8192)):
        with platform.compiling_for(device):
            spec = spec_of(lm, max_tokens=tokens)
        ahead = [*pieces(spec, spec.tokens), *last_pieces(spec)]
        known = {(piece.size, piece.keys) for piece in ahead}
        found = set()
        for length in range(1, tokens, 13):
            found |= {(piece.size, piece.keys) for piece in pieces(spec, length)}
            assert sum(piece.size for piece in pieces(spec, length)) <= spec.tokens
        assert found <= known
        assert len(known) <= 2 * len(spec.key_lengths)


def test_a_reading_may_rest_between_any_two_pieces(lm):
    """Its results are those of a reading at one go, and one layer is all that it holds."""
    spec = dataclasses.replace(spec_of(lm, max_tokens=200), chunk=64, tail=8, tails=7)
    tokens = np.random.default_rng(0).integers(0, 97, 101).tolist()
    prefiller = Prefiller(lm.decoder, lm.params, spec, Runner(None))
    whole = prefiller.read(tokens, "whole")
    other = prefiller.read(tokens[::-1], "another")
    reading, steps = prefiller.begin(tokens, "resting"), 0
    while not reading.done:
        layer = reading.advance()
        steps += 1
        np.asarray(reading.kv.k)  # rests until all of it is there
        if layer is not None:
            for name in ("k", "v", "queries"):
                found = np.asarray(getattr(reading.kv, name))
                wanted = np.asarray(getattr(whole.kv[layer], name))
                if name != "queries":
                    cut = np.s_[:, :, :101] if name == "k" else np.s_[:, :101]
                    found, wanted = found[cut], wanted[cut]
                np.testing.assert_array_equal(found, wanted)
    assert steps == lm.attention.num_layers * (1 + 5)
    np.testing.assert_array_equal(np.asarray(reading.x), np.asarray(whole.x))
    assert not np.array_equal(np.asarray(other.x), np.asarray(whole.x))


def test_rooms_hold_whole_tails():
    for pages in range(1, 8192):
        assert bucket(pages) % 8 == 0


@pytest.mark.parametrize(
    ("size", "limit", "piece"), [(1280, 512, 320), (7, 5, 1), (8, 8, 8), (3, 9, 3), (1, 1, 1)]
)
def test_the_greatest_divisor_within_a_limit(size, limit, piece):
    assert largest_divisor(size, limit) == piece
