"""The bench of all methods: which configs it makes, which rows are best, and a quick run of it."""

import dataclasses
import json

import pytest

from bench import leaderboard
from flexijax import policies
from flexijax.evaluation import Evaluation
from tests.planted import words_tokenizer
from tests.test_closeness import comparison
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.any_jax


@pytest.fixture(scope="module")
def lm():
    tiny = tiny_model(max_context=1024, vocab_size=97)
    return dataclasses.replace(tiny, tokenizer=words_tokenizer())


def arguments(*more):
    args = leaderboard._parser().parse_args(["--data", "none", *more])
    vars(args).update(leaderboard.QUICK)
    return args


def test_every_method_at_every_budget(lm):
    args = arguments("--budgets", "128", "256")
    configs, without = leaderboard.configs_of(lm, args.policies, args.budgets, args)
    expected = {f"{name}:{budget}" for name in policies.names() for budget in (128, 256)}
    expected = {name for name in expected if not name.startswith("full:")} | {"full"}
    assert set(configs) | set(without) == expected
    # No profile of this model is shipped.
    assert {name.partition(":")[0] for name in without} == {"flexi", "razor_attention"}
    assert "no profile of" in without["flexi:256"]
    assert configs["h2o:128"].budget_tokens == 128


def test_bytes_are_all_that_is_held(lm):
    """What a policy remembers among them; a method that drops takes less, but not while reading."""
    args = arguments("--budgets", "64")
    names = ["full", "streaming_llm", "morphkv"]
    configs, _ = leaderboard.configs_of(lm, names, [64], args)
    full, less, more = (leaderboard.bytes_of(lm, made, args) for made in configs.values())
    assert less["steady_mb"] < more["steady_mb"] < full["steady_mb"]
    assert less["peak_mb"] - less["steady_mb"] == pytest.approx(full["peak_mb"] - full["steady_mb"])


def test_the_best_are_those_that_nothing_beats_in_both():
    found = Evaluation(
        tuple(
            comparison(name, kl=kl)
            for name, kl in (("h2o:64", 0.3), ("quest:64", 0.1), ("a2sf:64", 0.2), ("full", 0.0))
        )
    )
    sizes = {"h2o:64": 2.0, "quest:64": 8.0, "a2sf:64": 2.5, "full": 8.0}
    held = {name: {"steady_mb": size} for name, size in sizes.items()}
    rows = leaderboard.rows_of(found, held)
    assert [row["config"] for row in rows] == ["full", "quest:64", "a2sf:64", "h2o:64"]
    assert [row["best"] for row in rows] == [True, False, True, True]
    assert [row["budget"] for row in rows] == [None, 64, 64, 64]


def test_a_quick_run_that_resumes(lm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(leaderboard, "load", lambda name: lm)
    data, out = tmp_path / "list.jsonl", tmp_path / "out.json"
    line = {"input": "w7 w3 w5 " * 300, "instructions": ["w1 w2"]}
    data.write_text(json.dumps(line) + "\n", encoding="utf-8")
    call = ["--data", str(data), "--quick", "--budgets", "64", "--json", str(out)]
    call += ["--records", str(tmp_path / "records.jsonl"), "--plot", str(tmp_path / "a.png")]
    call += ["--policies", "full", "streaming_llm", "h2o", "kvcrush"]
    assert leaderboard.main(call) == 0
    first = json.loads(out.read_text())
    assert {row["config"] for row in first["rows"]} == {"full", "streaming_llm:64", "h2o:64"}
    assert list(first["without"]) == ["kvcrush:64"]
    printed = capsys.readouterr()
    assert "h2o" in printed.out and "without kvcrush:64" in printed.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "records.jsonl").read_text()
    assert leaderboard.main(call) == 0
    assert (tmp_path / "records.jsonl").read_text() == before
    assert json.loads(out.read_text())["rows"] == first["rows"]
