"""The benches of reload bytes and of what profiling costs, on models of known answers."""

import dataclasses

import pytest

import flexijax
from bench import profile_cost, reload
from flexijax.models.language_model import LanguageModel
from flexijax.profiling.settings import Settings
from tests.planted import WORDS, planted_model, text_document, words_tokenizer
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.any_jax


def profile_of(lm: LanguageModel, unstable) -> flexijax.HeadProfile:
    return flexijax.HeadProfile(
        model=lm.name,
        num_layers=lm.attention.num_layers,
        num_kv_heads=lm.attention.num_kv_heads,
        unstable=unstable,
        page_size=16,
        budget_pages=2,
        source="by hand",
    )


def test_predicted_reload_bytes_are_those_counted():
    lm, unstable = planted_model()
    # Every planted unstable head is called stable, so that there is something to load.
    profile = profile_of(lm, tuple((layer, (head + 1) % 4) for layer, head in unstable))
    settings = Settings(page_size=4, budgets=(8,), steps=64, max_tokens=300)
    # Just one page begins between two reranks, and is the newest: random keys know no other reason
    # to choose it.
    row = reload.measure_document(lm, profile, text_document("a", 0), settings, interval=4)
    assert row["reranks"] == 16
    assert row["counted_mb"] > 0.01
    assert row["predicted_to_counted"] == pytest.approx(1, abs=0.1)
    assert row["rco"] == pytest.approx(row["rco_in_flexi"], abs=0.05)


def test_the_cost_of_profiling_is_that_of_the_same_tokens(monkeypatch):
    lm = dataclasses.replace(tiny_model(vocab_size=len(WORDS)), tokenizer=words_tokenizer())
    settings = Settings(budgets=(4,), steps=32, max_tokens=300)
    row = profile_cost.measure_document(lm, text_document("a", 0), settings)
    assert row["ratio"] == row["profile_s"] / row["full_s"] > 0
    really = profile_cost.record_prompt

    def another_text(*args):
        recording = really(*args)
        return recording._replace(tokens=recording.tokens[::-1] + 1)

    monkeypatch.setattr(profile_cost, "record_prompt", another_text)
    with pytest.raises(RuntimeError, match=r"disagree on what follows a\[0\]"):
        profile_cost.measure_document(lm, text_document("a", 0), settings)
