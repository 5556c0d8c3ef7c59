"""The laws that the cache is built on, on a tiny model.

See also test_cache_model.py, and test_bad_input.py for law 8.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.cache import cache as kv
from flexijax.config import MODES
from flexijax.engine import decode
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.decode import decode_chunk
from flexijax.engine.engine import Engine, Request
from flexijax.generate import make_program
from flexijax.models.dense import dense_attend
from flexijax.policies.minmax import MinMax
from tests.tiny_models import tiny_model

PAGE, STEPS = 4, 8
SMALL = flexijax.CacheConfig(page_size=PAGE, budget_tokens=4 * PAGE, rerank_interval=STEPS)
# Its chunks take STEPS steps as well.
ADAPTIVE = dataclasses.replace(SMALL, rerank_interval="adaptive")
INTERVALS = pytest.mark.parametrize("cache", [SMALL, ADAPTIVE], ids=["fixed", "adaptive"])


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module")
def profile():
    """A layer with a head of each kind, and one with stable heads only."""
    return flexijax.HeadProfile(
        model="tiny-llama",
        num_layers=2,
        num_kv_heads=2,
        unstable=((0, 1),),
        page_size=PAGE,
        budget_pages=4,
        source="by hand",
    )


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def request_of(length, *, max_new_tokens, index=0):
    return Request(
        index=index,
        tokens=tuple(prompt_of(length, seed=index)),
        max_new_tokens=max_new_tokens,
        sampling=flexijax.Sampling(),
        seed=0,
        stop_ids=(),
    )


# Law 1: with room for the whole context the answer is the dense model's.


@pytest.fixture(scope="module")
def dense(lm):
    """(prompt, 64 greedy tokens, logits float32[64, V] before each), every step read anew."""
    prompt, attend = prompt_of(29), dense_attend(lm.attention)

    @jax.jit
    def logits_of(text):
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        x, _ = lm.decoder.hidden(lm.params, text, positions, attend, None)
        return lm.decoder.logits(lm.params, x)[0]

    text = np.zeros((1, len(prompt) + 64), np.int32)
    text[0, : len(prompt)] = prompt
    for length in range(len(prompt), text.shape[1]):
        text[0, length] = int(logits_of(text)[length - 1].argmax())
    logits = np.asarray(logits_of(text))[len(prompt) - 1 : -1]
    return prompt, text[0, len(prompt) :].tolist(), logits


@pytest.mark.parametrize(
    ("mode", "interval"), [*((mode, STEPS) for mode in MODES), ("flexi", "adaptive")]
)
def test_with_budget_for_all_tokens_and_logits_are_the_dense_models(
    mode, interval, lm, profile, dense
):
    prompt, tokens, logits = dense
    roomy = dataclasses.replace(SMALL, mode=mode, budget_tokens=96, rerank_interval=interval)
    out = flexijax.generate(lm, [prompt], max_new_tokens=64, cache=roomy, profile=profile)[0]
    assert list(out.token_ids) == tokens

    program = make_program(lm, roomy, profile=profile, max_tokens=len(prompt) + 64, rows=1)
    got = Continuation(lm, program, read(lm, program, prompt)).feed(tokens[:STEPS])
    worst = np.abs(got - logits[1 : STEPS + 1]).max(-1) / np.abs(logits[1 : STEPS + 1]).max(-1)
    assert worst.max() < 1e-5
    assert np.abs(got).max(-1).min() > 0.1, "zeros would pass"


# Laws 2 and 3: every page can be read, both copies agree, and only promoted pages move.


@pytest.fixture(scope="module")
def dense_keys(lm):
    """A function of a text: per layer its keys and values [T, K, H], through dense attention."""
    attend = dense_attend(lm.attention)

    def recording(layer, q, k, v, state):
        out, _ = attend(layer, q, k, v, None)
        return out, (*state, (k[0], v[0]))

    @jax.jit
    def run(text):
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        return lm.decoder.hidden(lm.params, text, positions, recording, ())[1]

    def keys(tokens):
        text = np.zeros((1, 96), np.int32)  # one shape, one compilation
        text[0, : len(tokens)] = tokens
        return jax.device_get(run(text))

    return keys


def assert_every_page_is_readable(engine, running, truth):
    """truth: per layer keys and values [T, K, H] of the request's text."""
    layout, cache, row = engine.program.layout, jax.device_get(engine.cache), running.row
    length, table = int(cache.lengths[row]), cache.block_table[row]
    prompt = len(running.request.tokens)
    assert length == prompt + len(running.tokens) - 1
    assert table[: len(running.blocks)].tolist() == running.blocks
    for layer, (held, host) in enumerate(zip(cache.layers, cache.host, strict=True)):
        for at, head in enumerate(layout.slotted(layer)):
            slots = held.slot_page[row, at].tolist()
            for page in range(-(-length // PAGE)):
                first, last = page * PAGE, min((page + 1) * PAGE, length)
                copies = []
                if last == first + PAGE:
                    copies.append((host.k[table[page], at], host.v[table[page], at]))
                if page in slots:
                    slot = slots.index(page)
                    keys = held.slots_k[row, at, :, slot].T
                    copies.append((keys, held.slots_v[row, at, slot]))
                assert copies, f"page {page} of head {head} in layer {layer} is lost"
                for k, v in copies:
                    np.testing.assert_array_equal(k[: last - first], copies[0][0][: last - first])
                    np.testing.assert_array_equal(v[: last - first], copies[0][1][: last - first])
                    if layer == 0 or last <= prompt:  # what a small budget cannot change
                        for got, dense in ((k, truth[layer][0]), (v, truth[layer][1])):
                            np.testing.assert_allclose(
                                got[: last - first], dense[first:last, head], rtol=0, atol=1e-5
                            )
    return cache


def residents(layout, cache, row, length):
    """{(layer, head index, page)} of pages in slots that had begun at `length`."""
    return {
        (layer, at, page)
        for layer, held in enumerate(cache.layers)
        for at in range(len(layout.slotted(layer)))
        for page in held.slot_page[row, at].tolist()
        if page >= 0 and page * PAGE < length
    }


@INTERVALS
def test_pages_stay_readable_and_only_promoted_ones_move(cache, lm, profile, dense_keys):
    # The same sizes as in law 6's wave, so that programs are shared.
    program = make_program(lm, cache, profile=profile, max_tokens=94, rows=2)
    layout, engine = program.layout, Engine(lm, program, progress=None)
    assert layout.page_bytes == 2 * PAGE * 8 * 4
    for index, length in enumerate((37, 52)):
        engine.admit(request_of(length, max_new_tokens=40, index=index), "")
    requests = list(engine.running.values())
    promoted = [0, 0]
    before = jax.device_get(engine.cache)
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
            counted = engine.counted(running)
            assert counted.promoted == promoted[row]
            filled = length // PAGE - len(running.request.tokens) // PAGE
            assert counted.offloaded == filled * layout.num_slotted
            assert counted.reranks == (len(running.tokens) - 1) // STEPS
        before = after
    assert min(promoted) > 0, "nothing moved, so nothing was tested"


@INTERVALS
def test_the_mover_is_given_promoted_pages_alone(cache, lm, profile, monkeypatch):
    """What the counters say is what is loaded: nothing more crosses from the host."""
    program = make_program(lm, cache, profile=profile, max_tokens=94, rows=2)
    engine = Engine(lm, program, progress=None)
    engine.admit(request_of(52, max_new_tokens=40), "")
    loads = []

    def watched(slots_k, slots_v, host, load_block, *, transfer):
        loads.append(load_block)
        return promote(slots_k, slots_v, host, load_block, transfer=transfer)

    promote = decode.promote
    monkeypatch.setattr(decode, "promote", watched)
    steps = jax.jit(decode.decode_steps, static_argnums=0)

    @jax.jit
    def rerank(*args):
        loads.clear()
        return decode.rerank(program, *args), tuple(loads)

    held, rows = engine.cache, jax.tree.map(jnp.asarray, engine._rows)
    assert held is not None
    total = 0
    for _ in range(3):
        layers, lengths, rows, _, queries = steps(
            program, lm.params, held.layers, held.block_table, held.lengths, rows
        )
        after, given = rerank(held, layers, lengths, rows.active, queries)
        named = sum(int((load >= 0).sum()) for load in given)
        counted = int(after.counters.promoted.sum() - held.counters.promoted.sum())
        assert named == counted
        total += named
        held = after
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
        jnp.arange(blocks, dtype=jnp.int32)[None],
        jnp.asarray([blocks * page], jnp.int32),
        page_size=page,
        scale=0.1,
        implementation="xla",
    )
    q64, k64 = np.asarray(q[0], np.float64), np.asarray(k, np.float64)
    products = np.einsum("kgh,pksh->kpgs", q64, k64)
    rounding = 1e-6 * np.einsum("kgh,pksh->kpgs", np.abs(q64), np.abs(k64)).max((-1, -2))
    truth = products.max((-1, -2))
    assert (np.asarray(got[0], np.float64) >= truth - rounding).all()
    assert (truth > rounding).any(), "zeros would pass"
    # Not any upper bound: that of the exact minimum and maximum, widened by rounding only.
    ends = np.stack([k64.min(2), k64.max(2)])
    exact = np.maximum(q64[None] * ends[0][:, :, None], q64[None] * ends[1][:, :, None])
    slack = {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.002, "int8": 0.2}[summaries]
    bound = exact.sum(-1).max(-1).T
    assert (np.asarray(got[0]) <= bound * (1 + slack) + slack).all()


# Law 6: who shares the batch changes nothing.

LENGTHS = (45, 70, 52, 61)
SAMPLED = flexijax.Sampling(temperature=1.0, top_p=0.9, logprobs=True)
GREEDY = flexijax.Sampling(logprobs=True)


@INTERVALS
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_is_not_changed_by_its_neighbours(sampling, cache, lm, profile):
    prompts = [prompt_of(length, seed=length) for length in LENGTHS]
    seeds = [11, 12, 13, 14]
    wishes = [_with(sampling, seed=seed) for seed in seeds]

    def run(prompts, wishes, max_batch):
        return flexijax.generate(
            lm,
            prompts,
            max_new_tokens=24,
            cache=cache,
            profile=profile,
            sampling=wishes,
            max_batch=max_batch,
        )

    alone = [run([prompts[at]], [wishes[at]], 1)[0] for at in range(4)]
    # A stop token ends each at its own time, so that rows are reused while others go on.
    cuts = [24, 5, 14, 19]
    stops = [() if n == 24 else (g.token_ids[n],) for g, n in zip(alone, cuts, strict=True)]
    wishes = [_with(wish, stop_ids=stop) for wish, stop in zip(wishes, stops, strict=True)]
    together = run(prompts, wishes, 2)
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


# Law 7: the decode chunk holds no copy of a pool, calls nobody, and updates every leaf in place.


@pytest.fixture(scope="module", params=[SMALL, ADAPTIVE], ids=["fixed", "adaptive"])
def compiled_chunk(request, lm, profile):
    """(program's layout, the cache's abstract leaves, the compiled chunk)."""
    program = make_program(lm, request.param, profile=profile, max_tokens=94, rows=2)
    engine = Engine(lm, program, progress=None)
    rows = jax.tree.map(jnp.asarray, engine._rows)
    jitted = jax.jit(decode_chunk, static_argnums=0, donate_argnums=2)
    cache = kv.init(program.layout, program.policy.score)
    compiled = jitted.lower(program, lm.params, cache, rows).compile()
    return cache, compiled


def test_every_cache_leaf_is_updated_in_place(compiled_chunk):
    cache, compiled = compiled_chunk
    # The block table is handed through unchanged: it is not even an output of the program.
    changing = sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) - cache.block_table.nbytes
    memory = compiled.memory_analysis()
    aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
    assert changing <= aliased <= changing + cache.block_table.nbytes


def copied_shapes(compiled):
    return set(re.findall(r"= \w+\[([\d,]*)\]\S* copy\(", compiled.as_text()))


def test_no_pool_is_copied_and_nobody_is_called(compiled_chunk):
    cache, compiled = compiled_chunk
    pools = {
        ",".join(map(str, leaf.shape))
        for part in (cache.layers, cache.host)
        for leaf in jax.tree.leaves(part)
        if leaf.ndim >= 4
    }
    assert len(pools) >= 4
    assert not pools & copied_shapes(compiled)
    text = compiled.as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text
    # What is not donated has to be copied: this is how a copy would show.
    kept = jax.jit(lambda x: x.at[0].set(1.0)).lower(jnp.zeros((5, 7))).compile()
    assert "5,7" in copied_shapes(kept)


def places(tree):
    """Where the pools, slots and summaries of a cache lie in memory."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) if leaf.ndim >= 4]


def test_what_runs_updates_in_place_too(lm, profile):
    """On a CPU a chunk runs as several programs: each must take over the memory it is given."""
    program = make_program(lm, SMALL, profile=profile, max_tokens=94, rows=2)
    engine = Engine(lm, program, progress=None)
    engine.admit(request_of(37, max_new_tokens=40), "")
    old = engine.cache
    assert old is not None
    before = places((old.layers, old.host))
    engine.step()
    assert len(before) >= 12 and engine.cache is not None
    assert places((engine.cache.layers, engine.cache.host)) == before
    held = [leaf for leaf in jax.tree.leaves((old.layers, old.host)) if leaf.ndim >= 4]
    assert all(leaf.is_deleted() for leaf in held)
