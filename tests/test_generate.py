"""`generate` from prompts to results: order, text, stops, draws, compilations and metrics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.engine.jit_cache import forget_compiled, num_compiled
from flexijax.models.dense import dense_attend
from tests.planted import WORDS, words_tokenizer
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("short_chunks")

PAGE, NEW = 4, 20
PROFILE = flexijax.HeadProfile(
    model="tiny-llama",
    num_layers=2,
    num_kv_heads=2,
    unstable=((0, 1),),
    page_size=PAGE,
    budget_pages=4,
    source="by hand",
)
FLEXI = flexijax.CacheConfig(
    page_size=PAGE, budget_tokens=4 * PAGE, rerank_interval=8, profile=PROFILE
)
FULL = dataclasses.replace(FLEXI, policy="full")
# Between 17 and 24 pages with what is drawn: one bucket of shapes, so one set of programs.
LENGTHS = (50, 61, 54)


@pytest.fixture(scope="module")
def lm():
    model = tiny_model(vocab_size=len(WORDS))
    return dataclasses.replace(model, tokenizer=words_tokenizer())


@pytest.fixture(scope="module")
def run(lm):
    """`generate` with two requests at once, on the prompts unless others are named."""
    defaults = dict(max_new_tokens=NEW, cache=FLEXI, max_batch=2)
    return lambda prompts, **changes: flexijax.generate(lm, prompts, **(defaults | changes))


@pytest.fixture(scope="module")
def prompts():
    return [prompt_of(length) for length in LENGTHS]


def prompt_of(length):
    return np.random.default_rng(length).integers(0, len(WORDS), length).tolist()


# Its draws differ from token to token, which greedy ones of a random model may not.
DRAWN = flexijax.Sampling(temperature=1.5, logprobs=True, ignore_eos=True)
drawn_as = functools.partial(dataclasses.replace, DRAWN)


@pytest.fixture(scope="module")
def streamed():
    return []


@pytest.fixture(scope="module")
def results(run, prompts, streamed):
    """What later tests compare with: three prompts in two rows, streamed."""
    return run(prompts, sampling=DRAWN, stream=lambda index, piece: streamed.append((index, piece)))


def test_results_come_in_the_order_of_the_prompts(results):
    assert [out.metrics.prompt_tokens for out in results] == list(LENGTHS)
    for out in results:
        assert (len(out.token_ids), out.finish_reason) == (NEW, "length")
        assert out.metrics.new_tokens == NEW


def test_text_is_what_the_tokens_mean_and_pieces_join_to_it(lm, results, streamed):
    for index, out in enumerate(results):
        assert out.text == lm.tokenizer.decode(out.token_ids) != ""
        assert "".join(piece for at, piece in streamed if at == index) == out.text
    assert all(piece for _, piece in streamed)
    assert len(streamed) > 3 * len(results), "one piece each is no stream"


def test_text_prompts_are_tokenized(run, prompts, results):
    texts = [" ".join(WORDS[token] for token in prompt) for prompt in prompts]
    assert [out.token_ids for out in run(texts, sampling=DRAWN)] == [o.token_ids for o in results]


def test_a_stop_string_cuts_the_text_before_it(run, prompts, results):
    words = results[0].text.split(" ")
    end = next(n for n in range(9, NEW) if words[n] not in words[:n] and len(words[n]) == 3)
    pieces = []
    out = run(
        prompts,
        sampling=drawn_as(stop=(words[end],)),
        stream=lambda index, piece: pieces.append((index, piece)),
    )
    assert out[0].text == " ".join(words[:end]) + " "
    assert out[0].finish_reason == "stop"
    assert out[0].token_ids == results[0].token_ids[: end + 1]
    assert out[0].metrics.new_tokens == len(out[0].logprobs) == end + 1
    for index, other in enumerate(out):
        assert "".join(piece for at, piece in pieces if at == index) == other.text
        assert results[index].text.startswith(other.text)


def test_stop_tokens_end_a_request_and_are_left_out(run, prompts, results):
    stop = results[1].token_ids[6]
    out = run(prompts, sampling=drawn_as(stop_ids=(stop,)))
    for mine, whole in zip(out, results, strict=True):
        end = whole.token_ids.index(stop) if stop in whole.token_ids else NEW
        assert mine.token_ids == whole.token_ids[:end]
        assert len(mine.logprobs) == end
        assert mine.finish_reason == ("stop" if end < NEW else "length")
    assert out[1].finish_reason == "stop"


def test_the_models_own_stop_token_counts_unless_it_is_ignored(lm, run, prompts):
    (end,) = lm.tokenizer.stop_ids
    # So many draws at this temperature hold every one of 60 tokens, as good as surely.
    wild = dict(prompts=prompts[:2] * 4, max_new_tokens=35)
    own = run(**wild, sampling=flexijax.Sampling(temperature=5.0))
    ignored = run(**wild, sampling=flexijax.Sampling(temperature=5.0, ignore_eos=True))
    assert any(out.finish_reason == "stop" for out in own)
    for mine, whole in zip(own, ignored, strict=True):
        assert len(whole.token_ids) == 35
        cut = whole.token_ids.index(end) if end in whole.token_ids else 35
        assert mine.token_ids == whole.token_ids[:cut]


def test_log_probabilities_are_the_dense_models(lm, run, prompts):
    attend = dense_attend(lm.attention)

    @jax.jit
    def logprobs_of(text):
        positions = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        x, _ = lm.decoder.hidden(lm.params, text, positions, attend, None)
        return jax.nn.log_softmax(lm.decoder.logits(lm.params, x)[0])

    for prompt, out in zip(prompts, run(prompts, cache=FULL, sampling=DRAWN), strict=True):
        text = np.zeros((1, max(LENGTHS) + NEW), np.int32)
        text[0, : len(prompt) + NEW] = [*prompt, *out.token_ids]
        at = np.arange(len(prompt), len(prompt) + NEW)
        expected = np.asarray(logprobs_of(text))[at - 1, list(out.token_ids)]
        np.testing.assert_allclose(out.logprobs, expected, atol=1e-4)
        assert min(out.logprobs) < -1


def test_log_probabilities_are_given_only_when_asked_for(run, prompts):
    assert run(prompts, sampling=drawn_as(logprobs=False))[0].logprobs is None


def test_seeds_make_draws_come_again(run, prompts, results):
    def tokens(**changes):
        return [out.token_ids for out in run(prompts, **changes)]

    first = [out.token_ids for out in results]
    assert tokens(sampling=DRAWN) == first
    assert tokens(sampling=drawn_as(seed=0)) == first
    assert tokens(sampling=drawn_as(seed=1)) != first
    own = [drawn_as(seed=seed) for seed in (7, 8, 9)]
    assert tokens(sampling=own) == tokens(sampling=own)
    same = run([prompts[0]] * 3, sampling=[drawn_as(seed=3), drawn_as(seed=3), drawn_as(seed=4)])
    assert same[0].token_ids == same[1].token_ids != same[2].token_ids
    # Without a seed of its own, the place in the list makes the draws differ; and so it does where
    # prompts share one `Sampling`, whose seed then changes all of them.
    for shared in (DRAWN, [DRAWN, DRAWN], drawn_as(seed=3)):
        unnamed = run([prompts[0]] * 2, sampling=shared)
        assert unnamed[0].token_ids != unnamed[1].token_ids
    assert unnamed[0].token_ids == same[0].token_ids


def test_other_lengths_of_one_bucket_compile_nothing(run, results):
    """Counted twice: our own programs, and whatever jax hands to XLA, eager operations included.

    Once a prompt has been read in chunks and one in tails, of which shorter ends are.
    """
    compiled: list[str] = []
    run([prompt_of(length) for length in (70, 60)], sampling=DRAWN)

    def count(event: str, _: float, **__) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x * 3 + 4)(jnp.ones(3))
        assert compiled, "jax counts under another name now"
        compiled.clear()
        before = num_compiled()
        out = run([prompt_of(length) for length in (47, 72, 65, 49)], sampling=DRAWN)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert num_compiled() == before
    assert not compiled
    assert [o.metrics.compile_s for o in out] == [0.0] * 4


def test_decoding_is_compiled_once_and_before_there_is_a_cache(run):
    """What the compiler needs for itself is gone when the cache comes."""
    stages: list[str] = []

    def saw(stage: str, done: int, total: int) -> None:
        if (done, total) == (0, 1):
            stages.append(stage)

    forget_compiled()
    run([prompt_of(50)], progress=saw)
    assert stages.count("compiling decode") == 1
    assert stages.index("compiling decode") < stages.index("compiling prefill")
    reranks = [at for at, stage in enumerate(stages) if stage == "compiling end of a chunk"]
    assert reranks and max(reranks) < stages.index("compiling commit")
    # A request that ends with the prompt's own token needs none of it.
    stages.clear()
    forget_compiled()
    run([prompt_of(50)], max_new_tokens=1, progress=saw)
    assert "compiling prefill" in stages and "compiling decode" not in stages


def test_no_prompts_give_no_results(run):
    assert run([]) == []


def test_metrics_agree_with_the_sizes_of_the_cache(run, prompts, results):
    full = run(prompts, cache=FULL, sampling=DRAWN)
    page_bytes = 2 * PAGE * 8 * 4  # keys and values, H=8, float32
    # A sketch: two bits of up to 32 channels in a word for each token; its code: mean and step.
    summary_bytes, state_bytes = 2 * PAGE * 4, 2 * 8 * 4
    for length, flexi, dense in zip(LENGTHS, results, full, strict=True):
        pages = -(-(length + NEW - 1) // PAGE)  # the last token drawn is not held
        m = dense.metrics
        assert m.device_kv_bytes == m.full_kv_bytes == 4 * pages * page_bytes
        assert m.host_kv_bytes == m.summary_bytes == m.promoted_bytes == m.offloaded_bytes == 0
        assert (m.reranks, m.mean_overlap, m.head_overlap, m.evicted_tokens) == (0, None, (), 0)

        m = flexi.metrics
        slots = 4 + 2  # the budget and the pages that can begin in eight steps
        assert m.full_kv_bytes == 4 * pages * page_bytes
        # Three stable heads; the page being filled is on the device alone.
        assert m.host_kv_bytes == 3 * ((length + NEW - 1) // PAGE) * page_bytes
        assert m.summary_bytes == 4 * (pages * summary_bytes + state_bytes)
        assert m.device_kv_bytes == (pages + 3 * slots) * page_bytes + m.summary_bytes
        # 19 decode steps: two whole chunks are followed by a rerank, the third ends the request.
        assert m.reranks == 2
        assert m.promoted_bytes == m.promoted_pages * page_bytes
        # What fills up after the last rerank of a request stays where it is: nobody comes for it.
        filled = (length + 16) // PAGE - length // PAGE
        assert m.offloaded_bytes == 3 * filled * page_bytes
        assert [(layer, head) for layer, head, _ in m.head_overlap] == [(0, 0), (1, 0), (1, 1)]
        overlaps = [overlap for *_, overlap in m.head_overlap]
        assert m.mean_overlap == pytest.approx(sum(overlaps) / 3)
        # Of four chosen pages, those not there were promoted: two reranks, three heads.
        assert sum(1 - overlap for overlap in overlaps) * 2 * 4 == pytest.approx(m.promoted_pages)
        assert m.ttft_s > 0 and m.decode_s > 0
        assert m.tpot_ms == pytest.approx(1e3 * m.decode_s / (NEW - 1))
