"""The comparison of page scores: its candidates by hand, its intervals, and that it resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import score
from bench.score_candidates import named

PAGES, HEADS, GROUP, PAGE, WIDTH = 12, 2, 2, 4, 64


def scored(name, keys, q, scale):
    one = named(PAGE)[name]
    length = jnp.int32(PAGES * PAGE)
    state = one.fit(keys, length)
    summaries = one.summarize(keys, state)
    empty = one.empty(PAGES, HEADS, WIDTH)
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, summaries)
    assert jax.tree.map(lambda x: x.dtype, empty) == jax.tree.map(lambda x: x.dtype, summaries)
    return one.scores(
        q,
        summaries,
        jax.tree.map(lambda leaf: leaf[None], state),
        jnp.arange(PAGES, dtype=jnp.int32)[None],
        length[None],
        page_size=PAGE,
        scale=scale,
        implementation="xla",
    )


@pytest.mark.parametrize("name", named(PAGE))
def test_every_score_tells_good_pages_from_bad(name):
    """Pages lie along one direction, so that any sensible score orders them alike."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, HEADS, GROUP, WIDTH)).astype(np.float32)
    q[:, :, 1] = q[:, :, 0]
    along = q[0, :, 0] / np.linalg.norm(q[0, :, 0], axis=-1, keepdims=True)
    height = rng.permutation(np.linspace(-6, 6, PAGES))
    keys = height[:, None, None, None] * along[None, :, None]
    keys = (keys + 0.1 * rng.normal(size=(PAGES, HEADS, PAGE, WIDTH))).astype(np.float32)
    found = np.asarray(scored(name, jnp.asarray(keys), jnp.asarray(q), 0.25))
    assert found.shape == (1, HEADS, PAGES)
    for head in range(HEADS):
        # One bit says little more of a direction than its sign.
        best = set(np.argsort(-found[0, head])[:4])
        assert len(best & set(np.argsort(-height)[:6])) == 4
        assert found[0, head].std() > 0


def test_exact_is_the_attention_mass():
    rng = np.random.default_rng(1)
    # Halves and whole numbers, which bfloat16 holds.
    keys = rng.integers(-4, 5, (PAGES, HEADS, PAGE, WIDTH)) / 2
    q = rng.normal(size=(1, HEADS, GROUP, WIDTH)).astype(np.float32)
    weights = np.exp(0.25 * np.einsum("kgh,pksh->kgps", q[0], keys)).sum(-1)
    expected = np.log((weights / weights.sum(-1, keepdims=True)).mean(1))
    found = scored("exact", jnp.asarray(keys, jnp.float32), jnp.asarray(q), 0.25)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


def rows():
    """Two documents of each of two tasks; the sketch has half the divergence on one task."""
    for task, share in (("a", 0.5), ("b", 0.25)):
        for index, kl in enumerate((0.2, 0.4)):
            for system, factor in (("flexi:minmax16:1024", 1.0), ("flexi:sketch2:1024", share)):
                yield {
                    "task": task,
                    "index": index,
                    "system": system,
                    "kl": kl * factor,
                    "agreement": 0.9,
                    "promoted": 100,
                    "rco": 0.5,
                    "profile_difference": None,
                    "page_bytes": 256,
                    "state_bytes": 512,
                    "device_bytes": 2_000_000,
                }


def test_summary_by_hand():
    base, sketch = score.summary(list(rows()), ["flexi:minmax16:1024", "flexi:sketch2:1024"])
    assert base["kl"] == pytest.approx(0.3) and base["ratio"] == 1
    assert sketch["kl"] == pytest.approx(0.1125)
    assert sketch["ratio"] == pytest.approx(0.375)
    assert sketch["task_ratios"] == pytest.approx({"a": 0.5, "b": 0.25})
    assert sketch["worst_task_ratio"] == pytest.approx(0.5)
    assert 0.25 <= sketch["ratio_low"] < 0.375 < sketch["ratio_high"] <= 0.5
    assert sketch["kl_low"] < sketch["kl"] < sketch["kl_high"]
    assert (sketch["documents"], sketch["device_mb"]) == (4, 2.0)
    assert (sketch["rco"], sketch["profile_difference"], sketch["promoted"]) == (0.5, None, 100)


@pytest.mark.parametrize("system", ["full:sketch2:1024", "flexi:sketch3:1024", "flexi:sketch2"])
def test_an_unknown_system_is_named(system):
    with pytest.raises(ValueError, match=system):
        score.split(system)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = score.summary(list(rows()), ["flexi:minmax16:1024", "flexi:sketch2:1024"])
    score.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_measures_and_resumes(tmp_path, capsys):
    """The exact score stays nearer to full than the bound, and nothing is measured twice."""
    text = " ".join(f"Item {n} costs {n * n} coins." for n in range(60))
    data = tmp_path / "list.jsonl"
    line = {"input": text, "instructions": ["What does item 7 cost?"]}
    data.write_text(json.dumps(line) + "\n", encoding="utf-8")
    records, out = tmp_path / "records.jsonl", tmp_path / "out.json"
    call = ["--data", str(data), "--records", str(records), "--json", str(out), "--steps", "16"]
    call += ["--max-tokens", "500", "--systems", "quest:exact:128", "quest:minmax16:128"]
    assert score.main(call) == 0
    first = json.loads(out.read_text())["documents"]
    assert [row["system"] for row in first] == ["quest:exact:128", "quest:minmax16:128"]
    assert all(np.isfinite(row["kl"]) and row["kl"] > 0 for row in first)
    assert first[0]["kl"] < first[1]["kl"]
    before = records.read_text()
    capsys.readouterr()
    assert score.main(call) == 0
    assert records.read_text() == before
    assert json.loads(out.read_text())["documents"] == first
    assert "quest:exact:128" in capsys.readouterr().out
