"""Sampling: the filters against a plain NumPy oracle, the draws against the distribution."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.engine.requests import make_requests
from flexijax.engine.sampling import (
    METHODS,
    Sampling,
    SamplingRows,
    method_of,
    request_seed,
    sample,
    sampling_weights,
    step_keys,
)
from tests.tiny_models import tiny_model

VOCAB = 1000  # no multiple of the block of the running sum
jit_sample = jax.jit(sample, static_argnames="method")
jit_weights = jax.jit(sampling_weights, static_argnames="filtered")


def distribution(logits: np.ndarray, request: Sampling) -> np.ndarray:
    """The distribution that a request asks for, by sorting, in float64."""
    z = logits.astype(np.float64) / request.temperature
    p = np.exp(z - z.max())
    full = p / p.sum()
    order = np.argsort(-full, kind="stable")
    keep = np.ones(len(p), bool)
    if request.top_k is not None:
        keep = full >= full[order[min(request.top_k, len(p)) - 1]]
    if request.top_p is not None:
        left = np.where(keep, full, 0) / full[keep].sum()
        before = np.cumsum(left[order]) - left[order]
        keep &= left >= left[order][before < request.top_p].min()
    if request.min_p is not None:
        keep &= full >= request.min_p * full.max()
    return np.where(keep, full, 0) / full[keep].sum()


def run(
    logits, requests: list[Sampling], keys: jax.Array, method: str = "filtered"
) -> tuple[np.ndarray, np.ndarray]:
    """`sample`, padded to twelve rows so that the tests share one compilation."""
    count = len(requests)
    padded = jnp.zeros((12, VOCAB)).at[:count].set(logits)
    rows = SamplingRows.of(requests + [Sampling()] * (12 - count))
    token, logprob = jit_sample(padded, rows, jnp.resize(keys, (12,)), method=method)
    return np.asarray(token)[:count], np.asarray(logprob)[:count]


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, vocab)).astype(np.float32)


REQUESTS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=5.0, top_k=7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=10**6),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=2.0, top_p=1e-6),
    Sampling(temperature=1.0, top_p=1.0),
    Sampling(temperature=1.0, min_p=0.05),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.5, top_k=50, top_p=0.8, min_p=0.02),
    Sampling(temperature=0.7, top_k=3, top_p=0.5),
]


def test_filters_match_the_oracle():
    """All requests as one batch, so that each also meets rows that want something else."""
    logits = logits_of(0, len(REQUESTS))
    rows = SamplingRows.of(REQUESTS)
    weights = np.asarray(jit_weights(jnp.asarray(logits), rows, filtered=True), np.float64)
    for row, request in enumerate(REQUESTS):
        truth = distribution(logits[row], request)
        assert ((weights[row] > 0) == (truth > 0)).all(), request
        error = np.abs(weights[row] / weights[row].sum() - truth).max() / truth.max()
        assert error < 1e-5, request


def test_ties_at_the_threshold_are_kept_together():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 2.0, -1.0]])
    for request in (Sampling(temperature=1.0, top_k=2), Sampling(temperature=1.0, top_p=0.5)):
        kept = sampling_weights(logits, SamplingRows.of([request]), filtered=True)[0] > 0
        assert kept.tolist() == [False, True, True, True, False]


def test_impossible_tokens_are_never_drawn():
    logits = jnp.full((1, VOCAB), -jnp.inf).at[0, 731].set(-5.0)
    for request in (REQUESTS[0], REQUESTS[4], REQUESTS[5]):
        token, logprob = run(logits, [request], draw_keys(0, 1))
        assert (int(token[0]), float(logprob[0])) == (731, 0.0)


def draw_keys(seed: int, count: int) -> jax.Array:
    return step_keys(jnp.full(count, seed, jnp.uint32), jnp.arange(count, dtype=jnp.int32))


@pytest.mark.parametrize("request_", [REQUESTS[0], REQUESTS[5], REQUESTS[10]])
def test_draws_follow_the_distribution(request_):
    """Chi-squared over the likely tokens plus the rest as one; 4 sigma."""
    draws = 4000
    logits = logits_of(5)[:, :300] / 2
    tiled = jnp.broadcast_to(jnp.asarray(logits), (draws, logits.shape[1]))
    rows, keys = SamplingRows.of([request_] * draws), draw_keys(3, draws)
    tokens, _ = jit_sample(tiled, rows, keys, method=method_of(request_))
    truth = distribution(logits[0], request_)
    counts = np.bincount(np.asarray(tokens), minlength=len(truth))
    assert counts[truth == 0].sum() == 0
    likely = truth * draws >= 10
    expected = np.append(truth[likely], truth[~likely].sum()) * draws
    found = np.append(counts[likely], counts[~likely].sum())
    used = expected > 0
    chi2 = ((found - expected)[used] ** 2 / expected[used]).sum()
    degrees = used.sum() - 1
    assert chi2 < degrees + 4 * np.sqrt(2 * degrees)


def test_greedy_is_argmax_and_takes_the_first_of_equals():
    logits = jnp.asarray(logits_of(1, 3)).at[1, [40, 700]].set(99.0)
    token, logprob = run(logits, [Sampling()] * 3, draw_keys(0, 3))
    assert token.dtype == jnp.int32
    assert token.tolist() == np.argmax(np.asarray(logits), -1).tolist()
    assert int(token[1]) == 40
    truth = np.asarray(jax.nn.log_softmax(logits))[np.arange(3), np.asarray(token)]
    np.testing.assert_allclose(np.asarray(logprob), truth, rtol=1e-5, atol=1e-6)


def test_logprobs_are_those_of_the_model_before_temperature():
    logits = jnp.asarray(logits_of(2, 2))
    token, logprob = run(logits, [Sampling(temperature=3.0, top_k=5)] * 2, draw_keys(1, 2))
    truth = np.asarray(jax.nn.log_softmax(logits))[np.arange(2), np.asarray(token)]
    np.testing.assert_allclose(np.asarray(logprob), truth, rtol=1e-5)


def test_a_row_does_not_see_its_neighbours():
    """Alone, in another place, and beside rows with other parameters: the same draw."""
    request = Sampling(temperature=1.0, top_p=0.95)
    logits = jnp.asarray(logits_of(3, 4))
    seeds = jnp.asarray([9, 8, 7, 6], jnp.uint32)
    steps = jnp.asarray([5, 0, 2, 1], jnp.int32)
    alone, _ = run(logits[:1], [request], step_keys(seeds[:1], steps[:1]))
    others = [request, Sampling(), Sampling(temperature=9.0, top_k=3), request]
    batch, _ = run(logits, others, step_keys(seeds, steps))
    reverse, _ = run(logits[::-1], others[::-1], step_keys(seeds[::-1], steps[::-1]))
    assert int(alone[0]) == int(batch[0]) == int(reverse[-1])
    assert int(batch[1]) == int(jnp.argmax(logits[1]))


def test_no_program_chooses_while_it_runs():
    """What is asked of sampling is known before; a greedy program holds no draw at all."""
    shapes = (logits_of(0, 2), SamplingRows.of([Sampling()] * 2), draw_keys(0, 2))
    for method in METHODS:
        text = str(jax.make_jaxpr(partial(sample, method=method))(*shapes))
        assert "cond[" not in text
        assert ("cumsum" in text, "while" in text or "scan" in text) == (
            method != "greedy",
            method == "filtered",
        )


def test_the_least_that_serves_a_request():
    assert method_of(Sampling()) == method_of(Sampling(top_k=3, top_p=0.5)) == "greedy"
    assert method_of(Sampling(temperature=1.0, min_p=0.1)) == "weighted"
    assert method_of(Sampling(temperature=1.0, top_k=3)) == "filtered"
    assert method_of(Sampling(temperature=1.0, top_p=0.5)) == "filtered"


def test_more_than_a_request_needs_gives_it_the_same_tokens():
    """As beside a request that asks for more."""
    for least, requests in ((0, [Sampling()] * 12), (1, [REQUESTS[0], REQUESTS[8]] * 6)):
        found = [
            run(logits_of(4, 12), requests, draw_keys(2, 12), method)[0].tolist()
            for method in METHODS[least:]
        ]
        assert all(tokens == found[0] for tokens in found)


def test_steps_and_seeds_change_the_draw():
    rows, logits = [Sampling(temperature=1.0)] * 12, jnp.zeros((12, VOCAB))
    first, again, other = (run(logits, rows, draw_keys(seed, 12))[0] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) > 8


def test_request_seeds():
    free, own = Sampling(temperature=1.0), Sampling(temperature=1.0, seed=5)
    derived = [request_seed(one, place=place) for one in (free, own) for place in (0, 1)]
    assert len(set(derived)) == 4 and all(0 <= value < 2**32 for value in derived)
    assert derived == [request_seed(one, place=place) for one in (free, own) for place in (0, 1)]
    assert request_seed(free, place=3) == request_seed(replace(free, seed=0), place=3)


def test_prompts_draw_alike_where_each_names_the_same_seed():
    """One `Sampling` for all draws anew for each; one for each with the same seed draws alike."""
    lm, prompts = tiny_model(), [[1, 2], [1, 2], [1, 2]]

    def seeds(sampling):
        return [made.seed for made in make_requests(lm, prompts, 5, sampling)]

    own = Sampling(seed=5)
    shared = seeds(own)
    assert len(set(shared)) == 3
    assert seeds([own] * 3) == [shared[0]] * 3
    assert seeds([replace(own, temperature=1.0)] * 2 + [Sampling(seed=6)])[:2] == [shared[0]] * 2
    # Without a seed of its own, the place in the list makes the draws differ.
    assert seeds([Sampling()] * 3) == seeds(Sampling()) == seeds(None)
    assert len({*seeds(None), *shared}) == 6


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": float("nan")}, "temperature=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": "1"}, "temperature='1'"),
        ({"top_k": 0}, "top_k=0 must be None or an integer of at least 1"),
        ({"top_k": 1.5}, "top_k=1.5"),
        ({"top_p": 0.0}, "top_p=0.0 must be None or a number above 0 and up to 1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"stop": "abc"}, "stop='abc' must be a tuple"),
        ({"stop": ("",)}, "non-empty strings"),
        ({"stop_ids": (-1,)}, "stop_ids="),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Sampling(**values)


def test_is_a_value():
    lists: dict[str, Any] = {"stop": ["a", "b"], "stop_ids": [1]}
    request = Sampling(**lists)
    assert hash(request) == hash(Sampling(stop=("a", "b"), stop_ids=(1,)))
    assert replace(request, stop=()).stop_ids == (1,)
