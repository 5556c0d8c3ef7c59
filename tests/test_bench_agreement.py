"""The comparison of policies: its numbers by hand, and the policy that knows no keys."""

import jax.numpy as jnp
import numpy as np
import pytest

from bench import agreement
from flexijax.policies.base import forced, top_pages


def test_compare_equals_hand_computed_values():
    full = np.log(np.array([[0.5, 0.5, 1e-9], [0.1, 0.2, 0.7]], np.float32)) + 3
    other = np.log(np.array([[0.25, 0.75, 1e-9], [0.1, 0.2, 0.7]], np.float32))
    same, kl = agreement.compare(full, other)
    assert same.tolist() == [False, True]
    assert kl == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0], abs=1e-6)


def test_means_weigh_documents_alike():
    rows = [
        {"system": system, "agreement": 1.0, "kl": kl * scale, "tokens": tokens}
        for kl, tokens in ((0.1, 10), (0.3, 30))
        for system, scale in zip(agreement.SYSTEMS, (2, 1, 3, 4), strict=True)
    ]
    found = {row["system"]: row for row in agreement.means(rows)}
    assert found["flexi"]["kl"] == pytest.approx(0.4)
    assert found["flexi"]["kl_to_quest"] == pytest.approx(2.0)
    assert (found["quest"]["documents"], found["quest"]["tokens"]) == (2, 40)


def test_recent_chooses_the_first_and_the_newest_pages():
    score = agreement.Recent()
    q, table = jnp.zeros((2, 3, 2, 8)), jnp.zeros((2, 10), jnp.int32)
    lengths = jnp.array([35, 9], jnp.int32)
    summaries = score.empty(10, 3, 8)
    found = score.scores(
        q, summaries, (), table, lengths, page_size=4, scale=1.0, implementation=None
    )
    pages = np.asarray(top_pages(forced(found, lengths, page_size=4), 4))
    assert (np.sort(pages[0]) == [0, 6, 7, 8]).all()
    assert (np.sort(pages[1]) == [-1, 0, 1, 2]).all()
    assert score.summarize(jnp.zeros((5, 3, 4, 8))).shape == summaries[:5].shape
