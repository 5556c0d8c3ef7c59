"""Whether a profile describes a text: by hand, and in runs of a model with planted heads."""

import dataclasses
import warnings

import numpy as np
import pytest

import flexijax
from flexijax.cli import generate as cli_generate
from flexijax.cli import main as cli
from flexijax.policies.flexi import Flexi
from flexijax.policies.page_scores import name_of
from flexijax.profiles import lookup
from flexijax.profiles.staleness import HeadStability, ProfileFit, expected_rco, profile_fit
from flexijax.profiling.measure import profile_prompt
from tests.planted import WORDS, planted_model

PAGE, BUDGET = 4, 8
CACHE = flexijax.CacheConfig(page_size=PAGE, budget_tokens=PAGE * BUDGET, rerank_interval=8)


@pytest.fixture(scope="module")
def planted():
    """(model, its profile, the same profile with the planted heads given to others)."""
    lm, unstable = planted_model()
    right = profile_prompt(lm, prompt_of(150), page_size=PAGE, budget_pages=BUDGET)
    assert right.unstable == unstable
    at_lag = right.measured["rco_at_lag"]
    assert isinstance(at_lag, dict)
    rolled = {lag: [row[1:] + row[:1] for row in map(list, rows)] for lag, rows in at_lag.items()}
    wrong = dataclasses.replace(
        right,
        unstable=tuple((layer, (head - 1) % 4) for layer, head in unstable),
        measured={**right.measured, "rco_at_lag": rolled},
    )
    return lm, right, wrong


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(6, 60, length).tolist()


def run(lm, profile, **changes):
    asked = dict(max_new_tokens=60, cache=CACHE, sampling=flexijax.Sampling(ignore_eos=True))
    asked |= changes
    asked["cache"] = dataclasses.replace(asked["cache"], profile=profile)
    return flexijax.generate(lm, [prompt_of(200, 1)], **asked)[0]


def by_hand(lags):
    """A profile of one layer with two heads, of which head 0 is unstable."""
    return flexijax.HeadProfile(
        model="by hand",
        num_layers=1,
        num_kv_heads=2,
        unstable=((0, 0),),
        page_size=16,
        budget_pages=4,
        source="by hand",
        measured={"rco_at_lag": lags, "score": "minmax"} if lags else {},
    )


def test_expectations_are_read_between_the_measured_offsets():
    profile = by_hand({"4": [[0.1, 0.8]], "16": [[0.1, 0.6]], "32": [[0.1, None]]})
    assert expected_rco(profile, 0, 1, 4) == 0.8
    assert expected_rco(profile, 0, 1, 8) == pytest.approx(0.7)  # half way in the logarithm
    assert expected_rco(profile, 0, 1, 16) == 0.6
    assert expected_rco(profile, 0, 1, 1) == 0.8 and expected_rco(profile, 0, 1, 64) == 0.6
    assert expected_rco(by_hand(None), 0, 1, 16) is None


def test_a_fit_by_hand():
    profile = by_hand({"16": [[0.1, 0.6]]})

    def of(rco, reranks=3, **changes):
        run = dict(page_size=16, budget_pages=4, score="minmax") | changes
        return profile_fit(profile, [HeadStability(0, 1, rco, 16, reranks)], **run)

    assert of(0.5) == ProfileFit(0.5, 0.6, pytest.approx(0.1), False)
    assert of(0.4) == ProfileFit(0.4, 0.6, pytest.approx(0.2), True)
    # An expectation holds for what it was measured with alone.
    for changes in ({"page_size": 8}, {"budget_pages": 8}, {"score": "sketch2"}):
        assert of(0.4, **changes) is None
    better = of(0.9)
    assert better is not None and better.stale, (
        "a text that leaves the profile's order is not described by it either"
    )
    assert of(0.4, reranks=2) is None
    sizes = dict(page_size=16, budget_pages=4, score="minmax")
    assert profile_fit(by_hand(None), [HeadStability(0, 1, 0.4, 16, 3)], **sizes) is None
    assert profile_fit(profile, [], **sizes) is None


def test_a_profile_that_describes_the_text_is_not_stale(planted):
    lm, right, _ = planted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(lm, right).metrics
    assert found.profile_fit is not None and not found.profile_fit.stale
    assert found.profile_fit.difference < 0.1
    assert [entry[:2] for entry in found.head_rco] == [
        (layer, head) for layer in range(3) for head in right.stable_heads(layer)
    ]
    rco = np.array([rco for *_, rco in found.head_rco])
    assert rco.min() > 0.7
    assert found.profile_fit.observed == pytest.approx(rco.mean())
    assert found.mean_interval == 8


def test_a_profile_of_other_heads_is_stale_and_says_so(planted):
    lm, _, wrong = planted
    with pytest.warns(flexijax.StaleProfileWarning, match=r"1 of 1 texts: .* prompts\[0\] have"):
        found = run(lm, wrong).metrics
    assert found.profile_fit is not None and found.profile_fit.stale
    planted_ones = {(0, 2), (1, 0), (2, 1)}
    for layer, head, rco in found.head_rco:
        assert (rco < 0.5) == ((layer, head) in planted_ones)


def test_the_shipped_profile_can_be_compared_at_the_defaults():
    """Expectations hold for one page size, budget and score: else there is never a warning."""
    cache, profile = flexijax.CacheConfig(), lookup.load("smollm2-135m")
    assert (profile.page_size, profile.budget_pages) == (cache.page_size, cache.budget_pages)
    policy = cache.find_policy()
    assert isinstance(policy, Flexi)
    assert profile.measured["score"] == name_of(policy.score)
    assert expected_rco(profile, 0, 0, cache.chunk_steps) is not None


def test_too_few_reranks_say_nothing(planted):
    lm, _, wrong = planted
    assert run(lm, wrong, max_new_tokens=20).metrics.profile_fit is None
    assert (
        run(lm, None, cache=dataclasses.replace(CACHE, policy="full")).metrics.profile_fit is None
    )


# In so long a run of so small pages, the context grows to several times what was profiled.
@pytest.mark.filterwarnings("ignore::flexijax.StaleProfileWarning")
def test_adaptive_intervals_part_stable_heads_from_others(planted):
    """Where the profile is wrong, adaptive intervals still tell the heads apart."""
    lm, right, wrong = planted
    asked = dict(cache=dataclasses.replace(CACHE, rerank_interval="adaptive"), max_new_tokens=400)
    good, mixed = run(lm, right, **asked).metrics, run(lm, wrong, **asked).metrics
    fixed = run(lm, right, **(asked | {"cache": CACHE})).metrics
    assert good.mean_interval and mixed.mean_interval
    assert fixed.mean_interval == 8 < mixed.mean_interval < good.mean_interval
    assert good.mean_interval > 40
    # The stable ones keep their choice for good, so all that is promoted is of the others.
    assert good.promoted_pages == 0 < mixed.promoted_pages


@pytest.mark.filterwarnings("default")
def test_the_command_line_warns_in_one_line(planted, monkeypatch, capsys, tmp_path):
    lm, _, wrong = planted
    wrong.save(tmp_path / "wrong.json")
    monkeypatch.setattr(cli_generate, "load", lambda *_, **__: lm)
    text = " ".join(WORDS[token] for token in prompt_of(200, 1))
    command = ["generate", "--model", "planted", "--prompt", text, "--max-new-tokens", "60"]
    command += ["--page-size", "4", "--budget-tokens", "32", "--rerank-interval", "8"]
    assert cli.main([*command, "--profile", str(tmp_path / "wrong.json")]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("warning: ")] != []
    assert "mean RCO (of the profile)" in out
