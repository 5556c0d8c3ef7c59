"""Which profile `generate` uses: given, shipped, measured on the prompt, or none of it."""

import dataclasses
import json

import numpy as np
import pytest

import flexijax
from flexijax.cli import generate as cli_generate
from flexijax.cli import main as cli
from flexijax.profiles import lookup
from flexijax.profiling import choose as module
from flexijax.profiling.choose import choose
from flexijax.profiling.measure import profile_prompt
from tests.planted import WORDS, planted_model
from tests.tiny_models import tiny_model

PAGE, BUDGET = 4, 8
SIZES = dict(page_size=PAGE, budget_pages=BUDGET)
CACHE = flexijax.CacheConfig(page_size=PAGE, budget_tokens=PAGE * BUDGET, rerank_interval=8)
AUTO = dataclasses.replace(CACHE, profile="auto")
GREEDY = flexijax.Sampling(ignore_eos=True)


@pytest.fixture(scope="module")
def planted():
    return planted_model()


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(6, 60, length).tolist()


def test_auto_finds_the_planted_heads_and_says_where_they_come_from(planted):
    lm, unstable = planted
    seen = []
    out = flexijax.generate(
        lm,
        [prompt_of(30), prompt_of(150), prompt_of(170)],
        max_new_tokens=9,
        cache=AUTO,
        sampling=GREEDY,
        progress=lambda *call: seen.append(call),
    )
    # The first prompt says nothing: it fits into the budget.
    origin = "measured on prompt 2 of 3, 150 tokens; none of planted is shipped"
    for made in out:
        assert made.profile is not None
        assert made.profile.unstable == unstable
        assert made.metrics.profile == origin
        assert origin in made.profile.source
    measuring = [call[1:] for call in seen if call[0] == "measuring a profile on prompt 2 of 3"]
    assert measuring[0][0] > 0 and measuring[-1] == (214, 214)


def test_auto_gives_what_its_profile_gives_when_passed_on():
    """A model whose words depend on what is attended, with prompts of more than the budget."""
    lm = tiny_model(vocab_size=len(WORDS))
    prompts = [prompt_of(130, seed) for seed in range(2)]
    asked = dict(max_new_tokens=20, sampling=GREEDY)
    measured = flexijax.generate(lm, prompts, cache=AUTO, **asked)
    assert measured[0].profile is not None
    assert measured[0].profile == dataclasses.replace(
        profile_prompt(lm, prompts[0], **SIZES), source=measured[0].profile.source
    )
    given = dataclasses.replace(CACHE, profile=measured[0].profile)
    again = flexijax.generate(lm, prompts, cache=given, **asked)
    assert [out.token_ids for out in measured] == [out.token_ids for out in again]
    assert again[0].metrics.profile == "given by the caller"
    full = flexijax.generate(lm, prompts, cache=dataclasses.replace(AUTO, policy="full"), **asked)
    assert full[0].profile is None and full[0].metrics.profile is None


def test_prompts_that_say_nothing_leave_every_head_choosing_at_every_step():
    lm = tiny_model(vocab_size=len(WORDS))
    prompts = [prompt_of(20), prompt_of(47)]
    asked = dict(max_new_tokens=60, sampling=GREEDY)
    out = flexijax.generate(lm, prompts, cache=AUTO, **asked)
    assert out[0].profile is not None and out[0].metrics.profile is not None
    assert out[0].profile.unstable == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert out[0].metrics.profile.startswith("not measured: none of tiny-llama is shipped, and no ")
    assert (out[1].metrics.reranks, out[1].metrics.host_kv_bytes) == (0, 0)
    quest = dataclasses.replace(CACHE, policy="quest")
    same = flexijax.generate(lm, prompts, cache=quest, **asked)
    assert [made.token_ids for made in out] == [made.token_ids for made in same]


def test_a_shipped_profile_is_taken_and_nothing_is_measured(planted, monkeypatch):
    lm, unstable = planted
    shipped = dataclasses.replace(profile_prompt(lm, prompt_of(150), **SIZES), source="a file")
    monkeypatch.setattr(lookup, "names", lambda: ("planted",))
    monkeypatch.setattr(lookup, "_shipped", lambda name: shipped)
    monkeypatch.setattr(module, "profile_prompt", None)
    for asked in ("auto", None, "planted"):
        cache = dataclasses.replace(CACHE, profile=asked)
        choice = choose(lm, cache, prompts=[prompt_of(150)])
        assert choice.profile == shipped
        assert choice.origin.startswith("shipped ")


def test_a_prompt_that_fills_the_model_is_cut(planted):
    lm, unstable = planted
    choice = choose(lm, AUTO, prompts=[[7] * 690])
    assert choice.profile.unstable == unstable
    assert "636 tokens" in choice.origin  # 64 steps fit behind them in 700


def test_what_cannot_be_found_is_refused(planted, tmp_path):
    lm, _ = planted
    with pytest.raises(ValueError, match="no profile of 'planted' is shipped; pass profile='auto'"):
        choose(lm, CACHE)
    with pytest.raises(ValueError, match="measures on a prompt"):
        choose(lm, AUTO)
    other = dataclasses.replace(profile_prompt(lm, prompt_of(150), **SIZES), fingerprint="other")
    with pytest.raises(ValueError, match="fingerprint is other"):
        choose(lm, dataclasses.replace(CACHE, profile=other))
    file = tmp_path / "mine.json"
    dataclasses.replace(other, fingerprint="planted").save(file)
    of_file = dataclasses.replace(CACHE, profile=str(file))
    assert choose(lm, of_file).origin == f"read from the file {file}"


def test_auto_on_the_command_line(planted, monkeypatch, capsys, tmp_path):
    lm, unstable = planted
    monkeypatch.setattr(cli_generate, "load", lambda *_, **__: lm)
    out = tmp_path / "out.json"
    text = " ".join(WORDS[token] for token in prompt_of(150))
    command = ["generate", "--model", "planted", "--prompt", text, "--profile", "auto"]
    command += ["--page-size", "4", "--budget-tokens", "32", "--max-new-tokens", "9"]
    assert cli.main([*command, "--compare-full", "--json", str(out)]) == 0
    shown = capsys.readouterr().err.splitlines()
    origin = "measured on prompt 1 of 1, 150 tokens; none of planted is shipped"
    assert shown.count(f"profile: {origin}") == 1
    measuring = [line for line in shown if line.startswith("measuring a profile")]
    assert len(measuring) == 2, "begun and ended once: the comparison measures nothing"
    written = json.loads(out.read_text())
    assert written["metrics"]["profile"] == origin
    assert written["profile"]["unstable"] == [list(head) for head in unstable]
    assert written["full"]["profile"] is None
    # What was measured goes to a file with `flexijax profile`; here it would be the bulk of it.
    assert written["profile"]["rco"] is None
