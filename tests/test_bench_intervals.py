"""The benches of reload bytes and of rerank intervals, on models of which the answer is known."""

import dataclasses

import jax.numpy as jnp
import pytest

import flexijax
from bench import profile_cost, reload, rerank
from flexijax.models.language_model import LanguageModel
from flexijax.profiling.measure import Settings
from tests.planted import WORDS, planted_model, text_document, words_tokenizer
from tests.tiny_models import tiny_model


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


def test_intervals_are_compared_on_one_text(tmp_path):
    lm = dataclasses.replace(
        tiny_model(vocab_size=len(WORDS)), tokenizer=words_tokenizer(), dtype=jnp.dtype("float32")
    )
    file = tmp_path / "profile.json"
    profile_of(lm, ((0, 1),)).save(file)
    made = rerank.programs(
        lm,
        intervals=(8, 16),
        thresholds=((-9.0, -9.0), (9.0, 9.0)),
        budget_tokens=64,
        max_tokens=364,
        profile=str(file),
    )
    document = text_document("a", 1)
    rows = rerank.measure_document(lm, made, document, max_tokens=300, steps=48)
    found = {row["system"]: row for row in rows}
    assert list(found) == ["8", "16", "adaptive -9.0 -9.0", "adaptive 9.0 9.0"]
    # Never doubled is 16 at first and 8 from then on; always doubled is 16, then 32.
    assert [row["mean_interval"] for row in rows] == [8, 16, 24, 48 / 5]
    assert found["8"]["promoted"] > found["16"]["promoted"] > 0
    assert all(row["kl"] > 0 and row["tokens"] == 48 for row in rows)
    assert rerank.measure_document(lm, made, document, max_tokens=300, steps=48) == rows


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


def test_means_are_relative_to_sixteen_steps():
    rows = [
        {
            "system": system,
            "tokens": tokens,
            "kl": 0.1,
            "agreement": 0.5,
            "promoted": promoted,
            "mean_interval": 16,
        }
        for tokens, of in ((10, (20, 40)), (40, (40, 80)))
        for system, promoted in zip(("adaptive", "16"), of, strict=True)
    ]
    found = {row["system"]: row for row in rerank.means(rows)}
    assert found["adaptive"]["promoted_to_16"] == pytest.approx(0.5)
    assert found["16"]["promoted_a_token"] == pytest.approx(3.0)
    assert (found["16"]["documents"], found["16"]["tokens"]) == (2, 50)
