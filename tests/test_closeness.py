"""The bench of closeness: its names, its candidates by hand, its picture, and that it resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import closeness
from bench.score_candidates import CANDIDATES
from flexijax.evaluation import Comparison, Evaluation
from flexijax.pallas_kernels.page_selection.xla import attended_first, page_ranks
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.flexi import Flexi
from flexijax.policies.h2o import H2O
from flexijax.policies.minmax import MinMax
from flexijax.policies.page_score import PageShape, PageTable
from flexijax.policies.quest import Quest
from flexijax.policies.sketch import Sketch

pytestmark = pytest.mark.any_jax

PAGES, HEADS, GROUP, PAGE, WIDTH = 12, 2, 2, 4, 64


@pytest.mark.parametrize(
    ("name", "policy", "budget", "interval"),
    [
        ("flexi", Flexi(), 1024, 16),
        ("flexi:minmax", Flexi(score=MinMax()), 1024, 16),
        ("flexi:sketch4:512", Flexi(score=Sketch(4)), 512, 16),
        ("quest:2048:minmax8", Quest(score=MinMax("int8")), 2048, 16),
        ("h2o:512", H2O(), 512, 16),
        ("all_stable", Flexi(unstable=((), ())), 1024, 16),
        ("all_stable:minmax", Flexi(score=MinMax(), unstable=((), ())), 1024, 16),
        ("recent:256", Quest(score=closeness.Recent()), 256, 16),
        ("flexi:interval=32", Flexi(), 1024, 32),
        ("flexi:adaptive", Flexi(), 1024, Adaptive()),
        (
            "flexi:sketch2:adaptive=0.6/0.3:512",
            Flexi(),
            512,
            Adaptive(lengthen_at=0.6, shorten_at=0.3),
        ),
    ],
)
def test_a_name_says_what_is_meant(name, policy, budget, interval):
    config = closeness.parse(name, num_layers=2, profile="smollm2-135m")
    assert (config.policy, config.budget_tokens, config.rerank_interval) == (
        policy,
        budget,
        interval,
    )
    assert config.profile == "smollm2-135m"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flexy", "policy='flexy' must be one of"),
        ("flexi:sketch3", "'flexi:sketch3' must be METHOD.* a score one of minmax, "),
        ("flexi:adaptive=0.6", "'flexi:adaptive=0.6' must be METHOD"),
        ("flexi:adaptive=0.3/0.6", "shorten_at=0.6 of Adaptive"),
        ("flexi:interval=", "'flexi:interval=' must be METHOD"),
        ("h2o:sketch2", "'h2o:sketch2': the method 'h2o' scores no pages"),
        ("flexi:1000", "budget_tokens=1000 must be a multiple"),
    ],
)
def test_a_name_that_says_nothing_is_refused(name, words):
    with pytest.raises(ValueError, match=words):
        closeness.parse(name, num_layers=2)


def test_recent_chooses_the_first_and_the_newest_pages():
    score, lengths = closeness.Recent(), jnp.array([35, 9], jnp.int32)
    q = jnp.zeros((2, 3, 2, 8))
    table = PageTable.of_full_pages(jnp.zeros((2, 10), jnp.int32), lengths, 4)
    summaries = score.empty(10, 3, PageShape(4, 8, "float32"))
    found = score.scores(q, summaries, (), table, scale=1.0, implementation=None)
    ranked = attended_first(page_ranks(found), lengths, lengths, page_size=4, sinks=1)
    ranked = np.asarray(ranked)
    assert (np.argsort(-ranked[0], axis=-1, kind="stable")[:, :4] == [0, 8, 7, 6]).all()
    assert (np.argsort(-ranked[1], axis=-1, kind="stable")[:, :3] == [0, 2, 1]).all()
    assert np.isneginf(ranked[1, :, 3:]).all()
    assert score.summarize(jnp.zeros((5, 3, 4, 8))).shape == summaries[:5].shape


def scored(name, keys, q, scale):
    one, shape = CANDIDATES[name], PageShape(PAGE, WIDTH, "float32")
    length = jnp.int32(PAGES * PAGE)

    @jax.jit
    def score(keys, q):
        state = one.fit(keys, length)
        summaries = one.summarize(keys, state)
        found = one.scores(
            q,
            summaries,
            jax.tree.map(lambda leaf: leaf[None], state),
            PageTable.of_full_pages(jnp.arange(PAGES, dtype=jnp.int32)[None], length[None], PAGE),
            scale=scale,
            implementation="xla",
        )
        return found, summaries

    found, summaries = score(keys, q)
    assert found.shape in ((1, HEADS, 1, PAGES), (1, HEADS, GROUP, PAGES))
    empty = one.empty(PAGES, HEADS, shape)
    assert jax.tree.map(jnp.shape, empty) == jax.tree.map(jnp.shape, summaries)
    assert jax.tree.map(lambda x: x.dtype, empty) == jax.tree.map(lambda x: x.dtype, summaries)
    return page_ranks(found)


@pytest.mark.parametrize("name", CANDIDATES)
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


def test_scores_are_told_apart_by_how_they_are_written():
    """What stands in a records file must not hold an address, nor be that of another score."""
    written = {name: repr(score) for name, score in CANDIDATES.items()}
    assert len(set(written.values())) == len(CANDIDATES)
    assert not any(" at 0x" in text for text in written.values())


def comparison(config, *, kl, device_bytes=2_000_000):
    return Comparison(
        config=config,
        task="a",
        index=0,
        context=5000,
        tokens=64,
        steps=64,
        kl=kl,
        agreement=0.9,
        promoted_pages=128,
        evicted_tokens=0,
        mean_interval=16.0,
        rco=0.5,
        device_bytes=device_bytes,
        summary_bytes=500_000,
        host_bytes=0,
    )


def test_rows_show_megabytes_and_ratios():
    found = Evaluation((comparison("flexi", kl=0.1), comparison("quest", kl=0.05)))
    flexi, quest = closeness.rows_of(found, "quest")
    assert (flexi["device_mb"], flexi["summary_mb"], flexi["ratio"]) == (2.0, 0.5, 2.0)
    assert set(closeness.COLUMNS) <= set(flexi)
    # The base may not have been measured yet.
    assert closeness.rows_of(Evaluation(found.rows[:1]), "quest")[0]["ratio"] is None


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("full", "flexi:512", "flexi:1024", "quest:minmax:256")
    rows = tuple(
        comparison(name, kl=0.1 * at, device_bytes=10**6 * (1 + at))
        for at, name in enumerate(names)
    )
    closeness.draw(Evaluation(rows).summary(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_it_measures_and_resumes(tmp_path, capsys):
    """The exact score stays nearer to full than the bound, and nothing is measured twice."""
    text = " ".join(f"Item {n} costs {n * n} coins." for n in range(60))
    data = tmp_path / "list.jsonl"
    line = {"input": text, "instructions": ["What does item 7 cost?"]}
    data.write_text(json.dumps(line) + "\n", encoding="utf-8")
    records, out = tmp_path / "records.jsonl", tmp_path / "out.json"
    names = ["quest:exact:128", "quest:minmax16:128"]
    call = ["--data", str(data), "--records", str(records), "--json", str(out), "--steps", "16"]
    call += ["--max-tokens", "500", "--configs", *names, "--base", names[1]]
    assert closeness.main(call) == 0
    first = json.loads(out.read_text())
    assert [row["config"] for row in first["documents"]] == names
    assert all(np.isfinite(row["kl"]) and row["kl"] > 0 for row in first["documents"])
    assert first["rows"][0]["ratio"] < 1 == first["rows"][1]["ratio"]
    before = records.read_text()
    capsys.readouterr()
    assert closeness.main(call) == 0
    assert records.read_text() == before
    assert json.loads(out.read_text())["documents"] == first["documents"]
    assert names[0] in capsys.readouterr().out


def test_a_base_that_is_not_compared_is_refused(tmp_path):
    data = ["--data", str(tmp_path / "nothing.jsonl")]
    with pytest.raises(SystemExit, match="--base snapkv must be one of --configs"):
        closeness.main([*data, "--configs", "flexi", "--base", "snapkv"])
