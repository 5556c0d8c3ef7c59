"""A layer whose heads are kept in every way at once, in another order, each with its own room."""

import dataclasses

import jax
import numpy as np
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.policies.base import HOST, HeadGroup, Policy, Tier
from flexijax.policies.minmax import MinMax
from tests.tiny_models import tiny_model
from tests.tiny_runs import PAGE, SMALL, STEPS, dense_greedy, prompt_of

pytestmark = pytest.mark.usefixtures("short_chunks")

HEADS = 5
# Of each layer: one head that is dense, one each of two rooms, one selected, one offloaded; no two
# layers in the same order, and none in the order of the model.
ORDERS = ((3, 1, 4, 2, 0), (2, 4, 0, 1, 3))


@dataclasses.dataclass(frozen=True)
class Mixed(Policy):
    """Every kind of head group in each layer. rooms: tokens of the two that evict."""

    rooms: tuple[int, int]

    def groups(self, layer, run):
        dense, less, more, selected, offloaded = ((head,) for head in ORDERS[layer])
        score, pages = MinMax(), run.budget_pages
        return (
            HeadGroup(less, (Tier(self.rooms[0]),), unit="token"),
            HeadGroup(selected, (Tier(None),), attends=pages, score=score),
            HeadGroup(offloaded, (Tier(pages), Tier(None, HOST)), score=score),
            HeadGroup(more, (Tier(self.rooms[1]),), unit="token"),
            HeadGroup(dense, (Tier(None),)),
        )


@pytest.fixture(scope="module")
def lm():
    return tiny_model(num_heads=2 * HEADS, num_kv_heads=HEADS)


def config(policy, **changes):
    return dataclasses.replace(SMALL, policy=policy, profile=None, **changes)


def test_with_room_for_all_every_kind_at_once_is_full_attention(lm):
    prompt = prompt_of(29)
    tokens, logits = dense_greedy(lm, prompt, 64)
    roomy = config(Mixed((96, 104)), budget_tokens=96)
    out = flexijax.generate(lm, [prompt], max_new_tokens=64, cache=roomy)[0]
    assert list(out.token_ids) == tokens

    program = make_program(lm, roomy, max_tokens=len(prompt) + 64, max_new_tokens=64)
    fed = Continuation(lm, program, read(lm, [program], prompt))
    got = np.concatenate([fed.first_logits[None], fed.feed(tokens)[:-1]])
    error = np.abs(got - logits).max(-1) / np.abs(logits).max(-1)
    assert error.max() < 1e-5
    assert np.abs(got).max(-1).min() > 0.1, "zeros would pass"


def test_each_head_has_its_own_room(lm):
    prompt, text = prompt_of(53), prompt_of(4 * STEPS, seed=1)
    small = config(Mixed((9, 18)))
    program = make_program(lm, small, max_tokens=len(prompt) + len(text), max_new_tokens=len(text))
    fed = Continuation(lm, program, read(lm, [program], prompt))
    assert np.isfinite(fed.feed(text)).all()
    length = len(prompt) + len(text)
    cache = jax.device_get(all_rows(fed.cache))
    for layer in cache.layers:
        less, selected, offloaded, more, dense = layer.groups
        for group, room in ((less, 9), (more, 18)):
            assert group.count.tolist() == [[room]]
            kept = group.position[0, 0, :room].tolist()
            assert sorted(kept) == list(range(length - room, length))  # the default: the newest
        assert less.k.shape[3:] == (-(-(9 + STEPS) // PAGE), PAGE)
        assert more.k.shape[3:] == (-(-(18 + STEPS) // PAGE), PAGE)
        assert [host is not None for host in layer.host] == [False, False, True, False, False]
    assert fed.stats.evicted_tokens == 2 * (2 * length - 9 - 18)
    assert {(head.layer, head.head) for head in fed.stats.heads} == {(0, 0), (1, 3)}
    assert fed.stats.promoted_pages > 0
