"""Windows of lost mass against the formula, from random attention and random choices of pages."""

import dataclasses

import numpy as np
import pytest

from flexijax.profiles.lost_mass import window_losses
from flexijax.profiling.profile import make_profile
from flexijax.profiling.settings import Settings
from flexijax.profiling.statistics import DocumentRecord, Statistics
from tests.planted import planted_model

pytestmark = pytest.mark.any_jax

STEPS, LAYERS, HEADS, PAGES, BUDGET, RERANK, PAGE = 48, 2, 3, 30, 5, 16, 16


@pytest.fixture(scope="module")
def recorded():
    """(mass, stale mass, pages, lost of every step by the formula): float64, from page sets."""
    rng = np.random.default_rng(0)
    lengths = PAGE * (PAGES - 4) + 9 + np.arange(STEPS)
    pages = -(-lengths // PAGE)
    shape = (STEPS, LAYERS, HEADS)
    mass, stale, lost = (np.full(shape, np.nan) for _ in range(3))
    chosen = {}
    for t, layer, head in np.ndindex(shape):
        attention = rng.dirichlet(np.ones(pages[t]))
        newest = int(pages[t]) - 1
        now = {newest, *rng.permutation(newest)[: BUDGET - 1].tolist()}
        chosen[t, layer, head] = now
        mass[t, layer, head] = attention[list(now)].sum()
        if t >= RERANK:
            begun = set(range(pages[t - RERANK], pages[t]))
            old = chosen[t - RERANK, layer, head] | begun
            stale[t, layer, head] = attention[list(old)].sum()
            gone, come = now - old, old - now
            lost[t, layer, head] = attention[list(gone)].sum() - attention[list(come)].sum()
    return mass, stale, pages, lost


@pytest.mark.parametrize("window", [8, 16, 20])
def test_windows_are_means_of_the_formula(recorded, window):
    mass, stale, pages, lost = recorded
    found = window_losses(mass, stale, pages, budget=BUDGET, window=window)
    assert found.shape == (STEPS // window, LAYERS, HEADS)
    for at, of_window in enumerate(found):
        steps = [t for t in range(at * window, (at + 1) * window) if t >= RERANK]
        if not steps:
            assert np.isnan(of_window).all()
        else:
            np.testing.assert_allclose(of_window, lost[steps].mean(axis=0), atol=1e-12)
    assert np.nanmax(np.abs(found)) > 0.01


def test_steps_without_a_choice_are_left_out(recorded):
    mass, stale, pages, lost = recorded
    budget = int(pages[32])  # in the middle of the last window one more page begins
    found = window_losses(mass, stale, pages, budget=budget, window=16)
    chose = [t for t in range(32, 48) if pages[t] > budget]
    assert 0 < len(chose) < 16
    assert np.isnan(found[:2]).all()
    np.testing.assert_allclose(found[2], lost[chose].mean(axis=0), atol=1e-12)
    assert np.isnan(window_losses(mass, stale, pages, budget=PAGES, window=16)).all()


def test_unstable_are_the_heads_that_lose_most_or_those_of_the_least_rco():
    """By hand: head 2.3 keeps none of its pages and loses nothing, 1.0 loses most."""
    lm, _ = planted_model()
    instability, lost = np.full((2, 4, 3, 4), 0.2)
    instability[:, 2, 3] = 1.0
    lost[0] = np.nan  # in the first steps no choice is old enough
    lost[1:, 1, 0] = 0.4
    nothing = np.zeros((9, 3, 4))
    kept = Statistics(
        instability=instability,
        lost=lost,
        curve=nothing,
        lags=nothing,
        mass=nothing[0],
        undefined=0,
    )
    settings = Settings(page_size=4, budgets=(8,), max_tokens=300, fraction=0.1)
    records = [
        DocumentRecord(task=task, index=0, tokens=200, pages=50.0, at_budget={8: kept})
        for task in "ab"
    ]
    found = make_profile(lm, records, settings, budget=8)
    assert found.unstable == ((1, 0),)
    assert found.lost_mass is not None and found.rco is not None
    assert (found.lost_mass[1][0], found.lost_mass[2][3]) == (0.4, 0.2)
    assert (found.rco[1][0], found.rco[2][3]) == (0.8, 0.0)
    by_rco = dataclasses.replace(settings, unstable_by="rco")
    assert make_profile(lm, records, by_rco, budget=8).unstable == ((2, 3),)
