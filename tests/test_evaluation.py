"""Divergences, intervals and summaries against values found by hand."""

import math

import numpy as np
import pytest

from flexijax.evaluation import Comparison, Evaluation, bootstrap_interval, compare

pytestmark = pytest.mark.any_jax


def row(config, *, task="a", index=0, kl, **changes):
    values = dict(
        config=config,
        task=task,
        index=index,
        context=5000,
        tokens=60,
        steps=64,
        kl=kl,
        agreement=0.9,
        promoted_pages=128,
        evicted_tokens=0,
        mean_interval=16.0,
        rco=None,
        device_bytes=2_000_000,
        summary_bytes=500_000,
        host_bytes=0,
    )
    return Comparison(**(values | changes))


def rows():
    """Two documents of each of two tasks; the sketch has half, and a quarter, of the divergence."""
    for task, share in (("a", 0.5), ("b", 0.25)):
        for index, kl in enumerate((0.2, 0.4)):
            yield row("minmax", task=task, index=index, kl=kl)
            yield row("sketch", task=task, index=index, kl=kl * share, rco=0.5 if index else None)


def test_compare_equals_hand_computed_values():
    full = np.log(np.array([[0.5, 0.5, 1e-9], [0.1, 0.2, 0.7]], np.float32)) + 3
    other = np.log(np.array([[0.25, 0.75, 1e-9], [0.1, 0.2, 0.7]], np.float32))
    same, kl = compare(full, other)
    assert same.tolist() == [False, True]
    assert kl == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0], abs=1e-6)


def test_bootstrap_intervals_of_known_distributions():
    # The mean of four draws from (0, 0, 0, 4) is binomial in four trials of a quarter: 0 in 32 %
    # of all resamples, 3 or more in 5.1 %, 4 in 0.4 %.
    assert bootstrap_interval([0, 0, 0, 4], [1] * 4) == (0.0, 3.0)
    # Of ten halves, 2 to 8 in 97.9 % and 3 to 7 in 89 %.
    assert bootstrap_interval([0, 1] * 5, [1] * 10) == (0.2, 0.8)
    # Pairs stay together: every resample has the ratio.
    assert bootstrap_interval([2, 4, 60], [1, 2, 30]) == (2.0, 2.0)
    low, high = bootstrap_interval([1, 1], [0, 1])
    assert low == 1.0 and not math.isfinite(high)


def test_summary_by_hand():
    base, sketch = Evaluation(tuple(rows())).summary(base="minmax")
    assert (base.config, sketch.config) == ("minmax", "sketch")
    assert base.kl == pytest.approx(0.3)
    assert (base.ratio, base.ratio_low, base.ratio_high) == (1, 1, 1)
    assert sketch.kl == pytest.approx(0.1125)
    assert sketch.ratio == pytest.approx(0.375)
    assert sketch.task_ratios == pytest.approx({"a": 0.5, "b": 0.25})
    assert sketch.worst_task_ratio == pytest.approx(0.5)
    assert sketch.ratio_low is not None and sketch.ratio_high is not None
    assert sketch.kl_low is not None and sketch.kl_high is not None
    assert 0.25 <= sketch.ratio_low < 0.375 < sketch.ratio_high <= 0.5
    assert sketch.kl_low < sketch.kl < sketch.kl_high
    assert (sketch.documents, sketch.tokens, sketch.device_bytes) == (4, 240, 2e6)
    assert (sketch.rco, base.rco, sketch.promoted_per_step) == (0.5, None, 2.0)


def test_every_document_weighs_the_same():
    found = [row("it", index=0, kl=0.1, tokens=10, steps=16, promoted_pages=16)]
    found += [row("it", index=1, kl=0.3, tokens=60, steps=64, promoted_pages=192)]
    (one,) = Evaluation(tuple(found)).summary()
    assert (one.kl, one.promoted_per_step) == (pytest.approx(0.2), 2.0)
    assert (one.tokens, one.documents, one.ratio) == (70, 2, None)


def test_ratios_are_of_documents_that_both_have():
    found = [row("base", index=0, kl=0.1), row("base", index=1, kl=0.1)]
    found += [row("it", index=1, kl=0.3), row("it", index=2, kl=9.0)]
    summary = Evaluation(tuple(found)).summary(base="base")
    assert summary[1].ratio == pytest.approx(3.0)
    assert (summary[1].documents, summary[1].kl) == (2, pytest.approx(4.65))


def test_nothing_is_divided_by_what_does_not_diverge():
    found = Evaluation((row("full", kl=0.0), row("it", kl=0.3)))
    assert [one.ratio for one in found.summary(base="full")] == [None, None]


def test_an_unknown_base_is_named():
    with pytest.raises(ValueError, match="base='other' must be None or one of 'minmax', 'sketch'"):
        Evaluation(tuple(rows())).summary(base="other")
    assert Evaluation(()).summary(base="other") == ()
