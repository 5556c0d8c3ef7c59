"""The adapter for lm-evaluation-harness: likelihoods are those of decode steps."""

import dataclasses
from importlib.util import find_spec

import numpy as np
import pytest

from tests.planted import words_tokenizer
from tests.tiny_models import tiny_model
from tests.tiny_runs import SMALL, dense_greedy, prompt_of

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
CONTEXT = 128


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(tiny_model(), tokenizer=words_tokenizer())


def dense_logprob(lm, tokens, after):
    """(log-likelihood, greedy) of a continuation, every place of it read anew."""
    total, greedy = 0.0, True
    for at, token in enumerate(after):
        _, logits = dense_greedy(lm, [*tokens, *after[:at]], 1)
        row = logits[0].astype(np.float64)
        total += row[token] - np.logaddexp.reduce(row)
        greedy &= bool(row.argmax() == token)
    return total, greedy


def test_likelihoods_are_the_dense_models_where_all_is_kept(lm):
    from bench.harness.adapter import FlexijaxLM

    cache = dataclasses.replace(SMALL, budget_tokens=CONTEXT)
    adapter = FlexijaxLM(lm, cache, max_length=CONTEXT)
    context = prompt_of(30)
    right, _ = dense_greedy(lm, context, 11)
    asked = [(context, right), (prompt_of(9, seed=1), [4]), (context, [*right[:3], 9, 8])]
    found = adapter._loglikelihood_tokens([(("", ""), *of) for of in asked])
    for (tokens, after), (logprob, greedy) in zip(asked, found, strict=True):
        expected = dense_logprob(lm, tokens, after)
        assert logprob == pytest.approx(expected[0], abs=1e-3)
        assert greedy == expected[1]
    assert found[0][1] and not found[2][1]
    with pytest.raises(ValueError, match="longer than"):
        adapter._loglikelihood_tokens([(("", ""), context, prompt_of(CONTEXT))])


def test_texts_are_cut_at_their_ends(lm):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    from bench.harness.adapter import FlexijaxLM

    adapter = FlexijaxLM(lm, SMALL, max_length=CONTEXT)

    def ask(**options):
        asked = Instance("generate_until", {}, ("w3 w9 w4 " * 9, options), 0)
        return adapter.generate_until([asked])[0]

    whole = ask(until=[], max_gen_toks=12)
    assert len(whole.split()) > 1
    word = whole.split()[1]
    assert ask(until=[word], max_gen_toks=12) == whole[: whole.find(word)]
