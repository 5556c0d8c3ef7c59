"""Layers that attend to the pages which another layer has chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.cache.memory import request_bytes
from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.models.language_model import LanguageModel
from flexijax.policies.base import HeadGroup, Policy, Tier
from flexijax.policies.index_cache import IndexCache
from flexijax.policies.minmax import MinMax
from flexijax.policies.quest import Quest
from flexijax.policies.sketch import Sketch
from tests.cache_model import GROUP, KV_HEADS, LAYERS, SHAPE, VOCAB, WIDTH, TableDecoder

pytestmark = pytest.mark.usefixtures("short_chunks")

PAGE, BUDGET, STEPS, PROMPT, NEW = 4, 16, 8, 61, 24
TEXT = np.random.default_rng(1).integers(0, VOCAB, PROMPT + NEW).tolist()


def language_model(*, alike):
    """Of two layers; where they are alike the second has the first one's queries and keys."""
    rng = np.random.default_rng(5)

    def pair(heads):
        shapes = [(LAYERS, count, heads, WIDTH) for count in (VOCAB, 128)]
        return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)

    q, k, v = pair(KV_HEADS * GROUP), pair(KV_HEADS), pair(KV_HEADS)
    if alike:
        q, k = (tuple(np.stack([part[0]] * LAYERS) for part in side) for side in (q, k))
    head = rng.normal(size=(KV_HEADS * GROUP * WIDTH, VOCAB)).astype(np.float32)
    return LanguageModel(
        name="tables",
        decoder=TableDecoder(),
        params=jax.tree.map(jnp.asarray, {"q": q, "k": k, "v": v, "head": head}),
        attention=dataclasses.replace(SHAPE, scale=WIDTH**-0.5),
        vocab_size=VOCAB,
        max_context=128,
        dtype=jnp.dtype("float32"),
        tokenizer=None,
        fingerprint="tables",
    )


def program_of(lm, policy):
    cache = CacheConfig(policy=policy, page_size=PAGE, budget_tokens=BUDGET, rerank_interval=STEPS)
    return make_program(lm, cache, max_tokens=PROMPT + NEW, max_new_tokens=NEW)


def logits_of(lm, policy):
    program = program_of(lm, policy)
    return Continuation(lm, program, read(lm, [program], TEXT[:PROMPT])).feed(TEXT[PROMPT:])


@pytest.mark.parametrize("score", [MinMax(), Sketch(2)], ids=["minmax", "sketch"])
def test_a_layer_attends_to_what_another_has_chosen(score):
    """Where it would have chosen the same itself, nothing changes; else something does."""
    alike, other = language_model(alike=True), language_model(alike=False)
    mine = IndexCache(choosing=(0,), score=score)
    np.testing.assert_array_equal(logits_of(alike, mine), logits_of(alike, Quest(score)))
    assert not np.allclose(logits_of(other, mine), logits_of(other, Quest(score)), rtol=1e-2)


def test_heads_take_over_from_the_heads_that_are_named():
    lm = language_model(alike=True)
    swapped = IndexCache(choosing=(0,), heads=((), (1, 0)), score=MinMax())
    same = IndexCache(choosing=(0,), heads=((), (0, 1)), score=MinMax())
    expected = logits_of(lm, Quest(MinMax()))
    np.testing.assert_array_equal(logits_of(lm, same), expected)
    assert not np.allclose(logits_of(lm, swapped), expected, rtol=1e-2)


def test_layers_that_choose_all_are_quest():
    lm = language_model(alike=False)
    mine = IndexCache(choosing=(0, 1), score=MinMax())
    np.testing.assert_array_equal(logits_of(lm, mine), logits_of(lm, Quest(MinMax())))


def test_a_layer_that_takes_over_has_no_summaries():
    lm = language_model(alike=True)
    kept = [
        request_bytes(program_of(lm, policy).layout, PROMPT)
        for policy in (Quest(), IndexCache(choosing=(0,)))
    ]
    assert kept[1].summaries * LAYERS == kept[0].summaries > 0
    assert kept[0].device - kept[0].summaries == kept[1].device - kept[1].summaries
    assert program_of(lm, IndexCache()).chunk_ends == (0,)


@dataclasses.dataclass(frozen=True)
class Sourced(Policy):
    """The second layer takes over from `source`, pages as many as `attends`."""

    source: tuple
    attends: int = 4

    def groups(self, layer, run):
        every = (Tier(None),)
        if layer == 0:
            chooses = HeadGroup((0,), every, attends=4, score=MinMax())
            return (chooses, HeadGroup((1,), every))
        return (HeadGroup((0, 1), every, attends=self.attends, source=self.source),)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (
            Sourced((0, (0, 1))),
            r"source=\(0, \(0, 1\)\) of a head group of layer 1 must",
        ),
        (Sourced((1, (0, 0))), "of an earlier layer that choose 4 pages themselves"),
        (Sourced((0, (0, 0)), attends=3), "of an earlier layer that choose 3 pages themselves"),
        (Sourced((0, (0,))), r"of layer 1 must name a head for each of \(0, 1\)"),
        (IndexCache(heads=((), (0, 5))), "must name heads of an earlier layer"),
    ],
)
def test_a_source_that_cannot_be(policy, says):
    with pytest.raises(ValueError, match=says):
        program_of(language_model(alike=True), policy)


def test_both_heads_may_take_over_from_one():
    logits = logits_of(language_model(alike=True), Sourced((0, (0, 0))))
    assert np.isfinite(logits).all()


def test_what_a_group_with_a_source_is():
    with pytest.raises(ValueError, match="whose pages another layer chooses has no score"):
        HeadGroup((0,), (Tier(None),), attends=4, score=MinMax(), source=(0, (0,)))
    with pytest.raises(ValueError, match="source means nothing for a head group that is kept"):
        HeadGroup((0,), (Tier(None),), source=(0, (0,)))
    with pytest.raises(ValueError, match=r"choosing=\(1, 2\) must be layers that ascend from 0"):
        IndexCache(choosing=(1, 2))
