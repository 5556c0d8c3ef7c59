"""The laws that the cache is built on, on a tiny model.

See also test_laws_evicting.py and test_cache_model.py, test_laws_programs.py for law 7, and
test_bad_input.py for law 8.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache import offloaded
from flexijax.cache.cache import all_rows
from flexijax.engine import decode
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.execute import after_steps
from flexijax.engine.inventory import step_arrays
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import make_program
from flexijax.policies.minmax import MinMax
from flexijax.policies.page_score import PageTable
from tests.tiny_models import tiny_model
from tests.tiny_runs import (
    ADAPTIVE,
    PAGE,
    SMALL,
    STEPS,
    dense_greedy,
    dense_qkv,
    prompt_of,
    request_of,
)

pytestmark = pytest.mark.usefixtures("short_chunks")

INTERVALS = pytest.mark.parametrize("cache", [SMALL, ADAPTIVE], ids=["fixed", "adaptive"])


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


# Law 1: with room for the whole context the answer is the dense model's.


@pytest.fixture(scope="module")
def dense(lm):
    """(prompt, 64 greedy tokens, logits float32[64, V] before each)."""
    prompt = prompt_of(29)
    return prompt, *dense_greedy(lm, prompt, 64)


@pytest.mark.parametrize(
    ("policy", "interval"),
    [(name, STEPS) for name in ("full", "quest", "flexi", "index_cache")] + [("flexi", "adaptive")],
)
def test_with_budget_for_all_tokens_and_logits_are_the_dense_models(policy, interval, lm, dense):
    prompt, tokens, logits = dense
    roomy = dataclasses.replace(SMALL, policy=policy, budget_tokens=96, rerank_interval=interval)
    out = flexijax.generate(lm, [prompt], max_new_tokens=64, cache=roomy)[0]
    assert list(out.token_ids) == tokens

    program = make_program(lm, roomy, max_tokens=len(prompt) + 64, max_new_tokens=64)
    got = Continuation(lm, program, read(lm, [program], prompt)).feed(tokens[:STEPS])
    error = np.abs(got - logits[1 : STEPS + 1]).max(-1) / np.abs(logits[1 : STEPS + 1]).max(-1)
    assert error.max() < 1e-5
    assert np.abs(got).max(-1).min() > 0.1, "zeros would pass"


# Laws 2 and 3: every page can be read, both copies agree, and only promoted pages move.


@pytest.fixture(scope="module")
def dense_keys(lm):
    """A function of a text: per layer its queries, keys and values, through dense attention."""
    return dense_qkv(lm, 96)


def copies_of(group, layer_cache, at, row, index, page, block):
    """[(keys, values) [page, H], ...]: where a page of a head lies, in either tier."""
    arrays, host = layer_cache.groups[at], layer_cache.host[at]
    if group.kind == "selected":
        return [(arrays.k[block, index], arrays.v[block, index])]
    copies = [(host.k[block, index], host.v[block, index])]
    slots = arrays.slot_page[row, index].tolist()
    if page in slots:
        slot = slots.index(page)
        copies.append((arrays.k[row, index, :, slot].T, arrays.v[row, index, slot]))
    return copies


def assert_every_page_is_readable(engine, running, truth):
    """truth: per layer queries, keys and values [T, K, H] of the request's text."""
    layout, cache, row = engine.program.layout, jax.device_get(all_rows(engine.cache)), running.row
    length, table = int(cache.lengths[row]), cache.block_table[row]
    prompt = len(running.request.tokens)
    assert length == prompt + len(running.tokens) - 1
    assert table[: len(running.blocks)].tolist() == list(running.blocks)
    checked = 0
    for layer, at, group in layout.all_groups():
        for index, head in enumerate(group.heads):
            for page in range(-(-length // PAGE)):
                first, last = page * PAGE, min((page + 1) * PAGE, length)
                layer_cache, count = cache.layers[layer], last - first
                copies = copies_of(group, layer_cache, at, row, index, page, table[page])
                if group.kind == "offloaded" and count < PAGE:
                    copies = copies[1:]  # the host gets a page when it is full
                assert copies, f"page {page} of head {head} in layer {layer} is lost"
                for k, v in copies:
                    np.testing.assert_array_equal(k[:count], copies[0][0][:count])
                    np.testing.assert_array_equal(v[:count], copies[0][1][:count])
                    if layer == 0 or last <= prompt:  # what a small budget cannot change
                        for got, dense in ((k, truth[layer][1]), (v, truth[layer][2])):
                            np.testing.assert_allclose(
                                got[:count], dense[first:last, head], rtol=0, atol=1e-5
                            )
                checked += 1
    assert checked == 4 * -(-length // PAGE)
    return cache


def residents(layout, cache, row, length):
    """{(layer, head, page)} of pages in slots that had begun at `length`."""
    return {
        (layer, head, page)
        for layer, at, group in layout.all_groups()
        if group.kind == "offloaded"
        for index, head in enumerate(group.heads)
        for page in cache.layers[layer].groups[at].slot_page[row, index].tolist()
        if page >= 0 and page * PAGE < length
    }


@INTERVALS
def test_pages_stay_readable_and_only_promoted_ones_move(cache, lm, dense_keys):
    # The same sizes as in law 6's wave, so that programs are shared.
    program = make_program(lm, cache, max_tokens=94, max_new_tokens=24, batch=2)
    layout, engine = program.layout, ModelRunner(lm, program, progress=None)
    assert layout.sizes.page_bytes == 2 * PAGE * 8 * 4
    assert (layout.heads_of("offloaded"), layout.heads_of("selected")) == (3, 1)
    for index, length in enumerate((37, 52)):
        engine.admit(request_of(length, max_new_tokens=40, index=index), "")
    requests = list(engine.running.values())
    promoted = [0, 0]
    before = jax.device_get(all_rows(engine.cache))
    while True:
        engine.step()
        if not all(running.active for running in requests):
            break
        after = before
        for running in requests:
            text = [*running.request.tokens, *running.tokens]
            after = assert_every_page_is_readable(engine, running, dense_keys(text[:-1]))
            row = running.row
            length = int(after.lengths[row])
            arrived = residents(layout, after, row, length) - residents(layout, before, row, length)
            promoted[row] += len(arrived)
            stats = engine.stats(running)
            assert stats.promoted_pages == promoted[row]
            filled = length // PAGE - len(running.request.tokens) // PAGE
            assert stats.offloaded_pages == filled * layout.heads_of("offloaded")
            assert stats.chunks == (len(running.tokens) - 1) // STEPS
            assert stats.evicted_tokens == 0
        before = after
    assert min(promoted) > 0, "nothing moved, so nothing was tested"


@INTERVALS
def test_the_mover_is_given_promoted_pages_alone(cache, lm, monkeypatch):
    """What the statistics say is what is loaded: nothing more crosses from the host."""
    program = make_program(lm, cache, max_tokens=94, max_new_tokens=24, batch=2)
    engine = ModelRunner(lm, program, progress=None)
    engine.admit(request_of(52, max_new_tokens=40), "")
    loads = []

    def watched(slots_k, slots_v, host, load_block, *, transfer):
        loads.append(load_block)
        return promote(slots_k, slots_v, host, load_block, transfer=transfer)

    promote = offloaded.promote
    monkeypatch.setattr(offloaded, "promote", watched)
    steps = jax.jit(decode.decode_steps, static_argnums=0)

    def end_chunk(programs, *args):
        loads.clear()
        return decode.end_chunk_layer(programs, *args), tuple(loads)

    end_chunk = jax.jit(end_chunk, static_argnums=0)
    held, batch = engine.cache, jax.tree.map(jnp.asarray, engine._batch)
    assert held is not None
    cache, total = held, 0

    def promoted(layer):
        return sum(int(s.promoted.sum()) for s in layer.stats if s is not None)

    for _ in range(3):
        arrays = step_arrays(cache, [0])
        written, [standing], batch, _, [end] = steps(
            program, lm.params, *arrays, batch.active, batch
        )
        cache = after_steps(cache, [0], written, (standing,))
        for at, queries in enumerate(end.queries):
            layer = cache.layer(at, 0)
            of_layer = decode.BankEnd(end.end, queries)
            made, given = end_chunk(program.groups[at], layer, of_layer, jnp.int32(at))
            named = sum(int((load >= 0).sum()) for load in given)
            assert len(given) == 1 and named == promoted(made) - promoted(layer)
            cache = cache.with_layer(at, 0, made)
            total += named
    assert total > 0, "nothing moved, so nothing was tested"


# Law 4: a page's score is at least every product in it.


@pytest.mark.parametrize("summaries", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_bounds_every_product(summaries, dtype):
    blocks, heads, group, page, width = 24, 3, 2, 8, 40
    rng = np.random.default_rng(3)
    spread = np.exp(rng.normal(0, 2, (blocks, heads, 1, width)))  # channels of all magnitudes
    k = jnp.asarray(rng.normal(size=(blocks, heads, page, width)) * spread, dtype)
    q = jnp.asarray(rng.normal(size=(1, heads, group, width)), dtype)
    score = MinMax(summaries)
    got = score.scores(
        q,
        score.summarize(k),
        (),
        PageTable.of_full_pages(
            jnp.arange(blocks, dtype=jnp.int32)[None], jnp.asarray([blocks * page], jnp.int32), page
        ),
        scale=0.1,
        implementation="xla",
    )
    q64, k64 = np.asarray(q[0], np.float64), np.asarray(k, np.float64)
    products = np.einsum("kgh,pksh->kpgs", q64, k64)
    rounding = 1e-6 * np.einsum("kgh,pksh->kpgs", np.abs(q64), np.abs(k64)).max((-1, -2))
    truth = products.max((-1, -2))
    assert (np.asarray(got[0, :, 0], np.float64) >= truth - rounding).all()
    assert (truth > rounding).any(), "zeros would pass"
    # Not any upper bound: that of the exact minimum and maximum, widened by rounding only.
    ends = np.stack([k64.min(2), k64.max(2)])
    exact = np.maximum(q64[None] * ends[0][:, :, None], q64[None] * ends[1][:, :, None])
    slack = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.002, "int8": 0.2}[summaries]
    bound = exact.sum(-1).max(-1).T
    assert (np.asarray(got[0, :, 0]) <= bound * (1 + slack) + slack).all()


# Law 6: who shares the batch changes nothing.

LENGTHS = (45, 70, 52, 61)
SAMPLED = flexijax.Sampling(temperature=1.0, top_p=0.9, logprobs=True)
GREEDY = flexijax.Sampling(logprobs=True)


@INTERVALS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_is_not_changed_by_its_neighbours(sampling, cache, lm):
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    seeds = [11, 12, 13, 14]
    params = [_with(sampling, seed=seed) for seed in seeds]

    def run(prompts, params, max_batch):
        return flexijax.generate(
            lm,
            prompts,
            max_new_tokens=24,
            cache=cache,
            sampling=params,
            max_batch=max_batch,
        )

    alone = [run([prompts[at]], [params[at]], 1)[0] for at in range(4)]
    # A stop token ends each at its own time, so that rows are reused while others go on.
    cuts = [24, 5, 14, 19]
    stops = [() if n == 24 else (g.token_ids[n],) for g, n in zip(alone, cuts, strict=True)]
    params = [_with(one, stop_ids=stop) for one, stop in zip(params, stops, strict=True)]
    together = run(prompts, params, 2)
    for mine, theirs, stop in zip(alone, together, stops, strict=True):
        end = mine.token_ids.index(stop[0]) if stop else 24
        assert theirs.token_ids == mine.token_ids[:end]
        assert theirs.logprobs is not None and mine.logprobs is not None
        np.testing.assert_allclose(theirs.logprobs, mine.logprobs[:end], atol=1e-5)
        assert theirs.finish_reason == ("stop" if stop else "length")
    if sampling is SAMPLED:
        assert run([prompts[0]], [_with(sampling, seed=99)], 1)[0].token_ids != alone[0].token_ids


def _with(sampling, **changes):
    return flexijax.Sampling(**{**vars(sampling), **changes})
