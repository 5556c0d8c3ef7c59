"""RCO against values worked out by hand, and planted heads that must be found."""

import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.profiles import stability


def rco_of(sets, pages):
    """RCO matrix [T, T] of one head that chose the given page sets."""
    ids = jnp.asarray(sets, jnp.int32)[:, None, None, :]
    overlaps = stability.overlap_counts(ids, num_pages=max(pages))
    budget = ids.shape[-1]
    values = stability.random_corrected(overlaps, jnp.asarray(pages, jnp.int32), budget=budget)
    return np.asarray(values)[:, :, 0, 0]


def planted(rng, *, steps, layers, heads, unstable, budget, pages):
    """Page sets in which every head keeps its pages but those in `unstable`, which choose anew."""
    ids = np.zeros((steps, layers, heads, budget), np.int32)
    for layer in range(layers):
        for head in range(heads):
            kept = rng.permutation(pages)[:budget]
            for step in range(steps):
                if (layer, head) in unstable:
                    kept = rng.permutation(pages)[:budget]
                elif step % 3 == 2:
                    # Even a stable head exchanges a page now and then.
                    kept = kept.copy()
                    kept[rng.integers(budget)] = rng.choice(np.setdiff1d(np.arange(pages), kept))
                ids[step, layer, head] = kept
    return ids


def instabilities(ids, pages, window=16):
    budget = ids.shape[-1]
    overlaps = stability.overlap_counts(jnp.asarray(ids), num_pages=pages)
    counts = jnp.full((ids.shape[0],), pages, jnp.int32)
    rco = stability.random_corrected(overlaps, counts, budget=budget)
    return np.asarray(stability.instability(stability.window_curves(rco, window=window)))


@pytest.mark.parametrize(
    ("first", "second", "pages", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 16, 1.0),
        ([0, 1, 2, 3], [3, 2, 1, 0], 16, 1.0),
        ([0, 1, 2, 3], [4, 5, 6, 7], 16, -1 / 3),  # (0 - 1/4) / (3/4)
        ([0, 1, 2, 3], [0, 1, 6, 7], 16, 1 / 3),  # (1/2 - 1/4) / (3/4)
        ([0, 1, 2, 3], [0, 5, 6, 7], 16, 0.0),  # one of four is chance
        ([0, 1, 2, 3], [0, 1, 2, 7], 5, -0.25),  # (3/4 - 4/5) / (1/5)
    ],
    ids=["same", "same-any-order", "disjoint", "half", "chance", "few-pages"],
)
def test_rco_equals_hand_computed_values(first, second, pages, expected):
    assert rco_of([first, second], [pages, pages])[0, 1] == pytest.approx(expected, abs=1e-6)


def test_rco_uses_the_pages_of_the_later_step():
    values = rco_of([[0, 1], [0, 2], [0, 1]], [4, 5, 8])
    assert values[0, 1] == pytest.approx((0.5 - 0.4) / 0.6)
    assert values[0, 2] == pytest.approx(1.0)
    assert values[1, 2] == pytest.approx((0.5 - 0.25) / 0.75)
    assert np.isnan(values[np.tril_indices(3)]).all()


def test_random_sets_have_mean_zero():
    rng = np.random.default_rng(0)
    sets = [rng.permutation(40)[:10] for _ in range(120)]
    values = rco_of(sets, [40] * 120)
    assert abs(np.nanmean(values)) < 0.01


def test_no_choice_is_excluded_and_counted():
    values = rco_of([[0, 1, -1], [0, 1, 2], [0, 1, 2], [0, 1, 3]], [2, 3, 3, 4])
    assert np.isnan(values[:, :3]).all()
    assert np.isfinite(values[:3, 3]).all()
    assert stability.undefined_pairs(jnp.array([2, 3, 3, 4]), budget=3) == 3


def test_missing_pages_do_not_overlap():
    ids = jnp.array([[0, -1], [0, -1]], jnp.int32)[:, None, None, :]
    assert int(stability.overlap_counts(ids, num_pages=3)[0, 1, 0, 0]) == 1


def test_means_of_windows_clamp_at_zero_and_means_of_lags_do_not():
    rco = np.full((4, 4, 1, 1), np.nan, np.float32)
    rco[0, 1], rco[0, 2], rco[2, 3] = -0.5, 0.5, 0.25
    curves = stability.window_curves(jnp.asarray(rco), window=4)
    assert float(stability.instability(curves)[0, 0, 0]) == pytest.approx(0.75)
    assert np.asarray(stability.offset_means(curves))[:2, 0, 0].tolist() == [0.0, 0.5]
    lags = np.asarray(stability.lag_means(jnp.asarray(rco), lags=(1, 2, 3)))[:, 0, 0]
    assert lags[:2].tolist() == [-0.125, 0.5]
    assert np.isnan(lags[2])


def test_windows_start_where_the_last_ended():
    sets = [[0, 1], [0, 1], [0, 2], [0, 2], [5, 6], [0, 2]]
    ids = jnp.asarray(sets, jnp.int32)[:, None, None, :]
    rco = stability.random_corrected(
        stability.overlap_counts(ids, num_pages=8), jnp.full((6,), 8, jnp.int32), budget=2
    )
    curves = np.asarray(stability.window_curves(rco, window=2))[:, 0, 0, 0]
    assert curves.tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="window=7"):
        stability.window_curves(rco, window=7)


def test_ranks_share_ties():
    values = np.array([[0.5, 0.9], [0.5, 0.1]])
    assert stability.ranks(values).tolist() == [[1.5, 0.0], [1.5, 3.0]]


def test_planted_heads_are_found_without_error():
    rng = np.random.default_rng(1)
    layers, heads, pages, budget = 4, 3, 48, 12
    unstable = ((0, 1), (2, 0), (3, 2))
    sizes = {"steps": 48, "layers": layers, "heads": heads, "budget": budget, "pages": pages}
    sets = [planted(rng, unstable=unstable, **sizes) for _ in range(2)]
    documents = [instabilities(ids, pages) for ids in sets]
    assert stability.least_stable(stability.consensus(documents), 3) == unstable
    tasks = {"a": documents[:1] * 2, "b": documents[1:] * 2}
    assert stability.split_half_recall(tasks, stability.consensus, count=3) == 1.0
    assert stability.split_half_recall({"a": documents[:1]}, stability.consensus, count=3) is None


def test_any_chunking_gives_the_same_result():
    rng = np.random.default_rng(2)
    ids = planted(rng, steps=64, layers=2, heads=2, unstable=((1, 1),), budget=6, pages=20)
    whole = instabilities(ids, 20)
    in_parts = np.concatenate([instabilities(ids[:32], 20), instabilities(ids[32:], 20)])
    np.testing.assert_array_equal(whole, in_parts)
    other = instabilities(ids[:16], 20)
    there = stability.consensus([whole, other])
    back = stability.consensus([other, whole])
    np.testing.assert_allclose(there, back, rtol=1e-12)


def test_windows_without_a_value_are_left_out():
    defined = np.array([[[0.1, 0.9]]])
    nothing = np.full((1, 1, 2), np.nan)
    both = stability.consensus([np.concatenate([defined, nothing]), nothing])
    assert both.tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="nothing to rank"):
        stability.consensus([nothing])


def test_cross_overlap():
    lists = {"a": ((0, 0), (0, 1)), "b": ((0, 1), (1, 1))}
    matrix = stability.cross_overlap(lists)
    assert matrix["a"] == {"a": 1.0, "b": 0.5}
    assert matrix["b"]["a"] == 0.5


def test_predicted_loads_invert_rco():
    # 64 of 320 pages, 48 kept: RCO is (0.75 - 0.2) / 0.8. One page of the 16 exchanged is new.
    loads = stability.predicted_loads(
        np.array([[0.55 / 0.8, 1.0]]), lag=16, budget=64, pages=320.0, page_size=16
    )
    assert loads.tolist() == [[pytest.approx(15.0), 0.0]]
