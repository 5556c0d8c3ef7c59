"""The laws for heads that drop tokens; what they keep is in test_evicting_keeps.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache import cache as kv
from flexijax.cache.cache import Cache, all_rows
from flexijax.cache.evicting import EvictingGroup
from flexijax.cache.layout import slots_of
from flexijax.cache.memory import nbytes, request_bytes
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import bucket, make_program
from flexijax.engine.program import Runner
from tests.dropping import DROPPING, GROWING
from tests.tiny_models import tiny_model
from tests.tiny_runs import PAGE, SMALL, STEPS, dense_greedy, prompt_of

pytestmark = pytest.mark.usefixtures("short_chunks")


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module", params=DROPPING)
def small(request):
    """A budget of 16 tokens, pages of 4, chunks of 8 steps."""
    return dataclasses.replace(SMALL, policy=DROPPING[request.param])


def evicting_groups(layers):
    return [group for layer in layers for group in layer.groups if isinstance(group, EvictingGroup)]


# Law 1: with room for the whole context the answer is the dense model's.


@pytest.fixture(scope="module")
def dense(lm):
    """(prompt, 64 greedy tokens, logits float32[64, V] before each)."""
    prompt = prompt_of(29)
    return prompt, *dense_greedy(lm, prompt, 64)


def test_with_room_for_all_tokens_and_logits_are_the_dense_models(small, lm, dense):
    prompt, tokens, logits = dense
    roomy = dataclasses.replace(small, budget_tokens=96)
    out = flexijax.generate(lm, [prompt], max_new_tokens=64, cache=roomy)[0]
    assert list(out.token_ids) == tokens
    assert out.metrics.evicted_tokens == 0

    program = make_program(lm, roomy, max_tokens=len(prompt) + 64, max_new_tokens=64)
    fed = Continuation(lm, program, read(lm, [program], prompt))
    got = np.concatenate([fed.first_logits[None], fed.feed(tokens)[:-1]])
    error = np.abs(got - logits).max(-1) / np.abs(logits).max(-1)
    assert error.max() < 1e-5
    assert np.abs(got).max(-1).min() > 0.1, "zeros would pass"


def test_with_little_room_the_answer_is_another(small, lm, dense):
    """So that a cache which keeps everything after all would be noticed."""
    prompt, tokens, _ = dense
    out = flexijax.generate(lm, [prompt], max_new_tokens=64, cache=small)[0]
    assert list(out.token_ids) != tokens
    assert out.metrics.evicted_tokens > 0


# Law 2: what is kept on the device is the closed form.

NEW = 8


def room_of(cache):
    """Tokens that a head may keep."""
    grows = bucket(-(-NEW // PAGE)) * PAGE if cache.policy in GROWING.values() else 0
    return cache.budget_tokens + grows


@pytest.mark.parametrize("tokens", [512, 40])
def test_device_bytes_are_the_closed_form(small, lm, tokens):
    cache = dataclasses.replace(small, budget_tokens=64)
    program = make_program(lm, cache, max_tokens=tokens, max_new_tokens=NEW)
    layout, shape = program.layout, lm.attention
    slots = min(layout.sizes.pages, -(-(room_of(cache) + STEPS) // PAGE))
    assert {slots_of(group, layout.sizes) for *_, group in layout.all_groups()} == {slots}
    held = kv.init(layout, program.policy)
    groups = evicting_groups(all_rows(held).layers)
    assert len(groups) == shape.num_layers
    expected = shape.num_kv_heads * 2 * shape.head_dim * 4 * PAGE * slots
    assert [nbytes((group.k, group.v)) for group in groups] == [expected] * shape.num_layers
    assert nbytes([layer.host for layer in held.pools]) == 0

    reported = request_bytes(layout, tokens)
    pages = min(slots, -(-tokens // PAGE))
    assert reported.device == expected // slots * pages * shape.num_layers
    full = make_program(lm, dataclasses.replace(cache, policy="full"), max_tokens=tokens)
    dense = nbytes([layer.groups for layer in all_rows(kv.init(full.layout, full.policy)).layers])
    if tokens == 8 * cache.budget_tokens:
        assert nbytes(groups) < dense / 4, "with positions and what the policy remembers"
    else:
        assert nbytes([(group.k, group.v) for group in groups]) == dense


def test_bytes_do_not_grow_with_the_answer(small, lm):
    """All that is held of a head, what the policy remembers among it; unless every token stays."""
    held = []
    for new in (16, 2048):
        program = make_program(lm, small, max_tokens=64 + new, max_new_tokens=new)
        cache = kv.abstract(program.layout, program.policy)
        held.append(nbytes(evicting_groups(all_rows(cache).layers)))
    assert (held[0] == held[1]) == (small.policy not in GROWING.values())


# What is not kept is not read: all of it poisoned, nothing changes.


def poisoned(group: EvictingGroup, counts) -> EvictingGroup:
    """Every place at and beyond int32[B, K] as it might be left by anything."""
    batch, heads, _, slots, page = group.k.shape
    beyond = np.arange(slots * page) >= counts[..., None]
    of_pages = beyond.reshape(batch, heads, slots, page)

    def of_token(leaf):
        anything = jnp.asarray(10**6 if leaf.dtype == jnp.int32 else jnp.nan, leaf.dtype)
        return jnp.where(beyond.reshape(*beyond.shape, *(1,) * (leaf.ndim - 3)), anything, leaf)

    return dataclasses.replace(
        group,
        k=jnp.where(of_pages[:, :, None], jnp.nan, group.k),
        v=jnp.where(of_pages[..., None], jnp.nan, group.v),
        position=jnp.where(beyond, 10**6, group.position),
        state=dataclasses.replace(group.state, tokens=jax.tree.map(of_token, group.state.tokens)),
    )


def poisoned_cache(cache: Cache, *, whole: bool) -> Cache:
    """whole: the buffers are poisoned from their first place on."""
    for at in range(len(cache.pools)):
        layer = cache.layer(at, 0)
        counts = [np.asarray(group.count) * (not whole) for group in layer.groups]
        groups = tuple(map(poisoned, layer.groups, counts))
        cache = cache.with_layer(at, 0, dataclasses.replace(layer, groups=groups))
    return cache


def test_what_is_not_kept_is_not_read(small, lm):
    prompt, text = prompt_of(37), prompt_of(5 * STEPS, seed=1)
    tokens = len(prompt) + len(text)
    program = make_program(lm, small, max_tokens=tokens, max_new_tokens=NEW, batch=2)
    made = read(lm, [program], prompt)
    expected = Continuation(lm, program, made).feed(text)

    # Before the commit: the buffers, and what stands behind the prompt.
    length = len(prompt)
    spoilt = tuple(
        dataclasses.replace(
            of_layer,
            k=of_layer.k.at[:, :, length:].set(jnp.nan),
            v=of_layer.v.at[:, length:].set(jnp.nan),
        )
        for of_layer in made.kv
    )
    fed = Continuation(lm, program, made)
    empty = poisoned_cache(kv.init(program.layout, program.policy), whole=True)
    blocks = range(program.layout.sizes.pages)
    spoilt_prompt = dataclasses.replace(made, kv=spoilt)
    fed.cache = spoilt_prompt.commit(Runner(None), program, empty, row=0, blocks=blocks)
    # After it: the prompt's own arrays, which are gone for good.
    for leaf in jax.tree.leaves((made.kv, spoilt)):
        leaf.delete()
    for start in range(0, len(text), STEPS):
        fed.cache = poisoned_cache(fed.cache, whole=False)
        spoilt_places = [
            np.isnan(group.k[0]).sum() for group in evicting_groups(all_rows(fed.cache).layers)
        ]
        assert min(spoilt_places) > 0, "no place was poisoned"
        logits = fed.feed(text[start : start + STEPS])
        assert np.isfinite(logits).all()
        np.testing.assert_array_equal(logits, expected[start : start + STEPS])
    assert fed.stats.evicted_tokens > 0


# Law 6: who shares the batch changes nothing.


# Those that remember something of a head, and one of each kind that remembers nothing.
@pytest.mark.parametrize("name", ["streaming_llm", "snapkv", "h2o", "morphkv", "lacache"])
def test_a_request_is_not_changed_by_its_neighbours(name, lm):
    small = dataclasses.replace(SMALL, policy=DROPPING[name])
    prompts = [prompt_of(length, seed=length) for length in (45, 70, 52)]
    params = flexijax.Sampling(temperature=1.0, top_p=0.9, logprobs=True)
    each = [dataclasses.replace(params, seed=seed) for seed in (11, 12, 13)]

    def run(prompts, sampling):
        return flexijax.generate(lm, prompts, max_new_tokens=24, cache=small, sampling=sampling)

    alone = [run([prompt], [one])[0] for prompt, one in zip(prompts, each, strict=True)]
    # The second ends inside its second chunk, while the others go on.
    stop = alone[1].token_ids[12]
    each[1] = dataclasses.replace(each[1], stop_ids=(stop,))
    together = run(prompts, each)
    for mine, theirs, count in zip(alone, together, (24, 12, 24), strict=True):
        end = min(count, (*mine.token_ids, stop).index(stop)) if count < 24 else 24
        assert theirs.token_ids == mine.token_ids[:end]
        assert theirs.logprobs is not None and mine.logprobs is not None
        np.testing.assert_allclose(theirs.logprobs, mine.logprobs[:end], atol=1e-5)
    for mine, theirs in zip(alone[::2], together[::2], strict=True):
        assert theirs.metrics.evicted_tokens == mine.metrics.evicted_tokens > 0
