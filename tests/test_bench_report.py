"""The report and the README's tables: from JSON files, and from nothing else."""

import importlib.util
import json

import pytest

from bench import kernels, memory, report, report_tables

pytestmark = pytest.mark.any_jax

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="pictures need the plot extra"
)


def test_the_readme_shows_what_the_committed_results_say(repository):
    found = report_tables.load(repository / "bench" / "results")
    assert {"compare", "closeness"} <= {content["bench"] for content in found.values()}
    text = (repository / "README.md").read_text(encoding="utf-8")
    again = "run `python -m bench.report bench/results --readme README.md`"
    assert report.in_readme(text, report_tables.readme(found)) == text, again
    for content in found.values():
        environment = content["environment"]
        assert content["command"].startswith(f"python -m bench.{content['bench']}")
        assert environment["cpu"] and environment["packages"]["jax"]
        assert len(environment["commit"]) == 40, "measured on files that are committed"
        assert not content.get("wrong")


def results_in(folder):
    """A small result of every kind that has a picture."""
    about = {
        "environment": {
            "cpu": "a <fast> one",
            "threads": 2,
            "cores": 4,
            "system": "Linux x86_64",
            "python": "3.11",
            "packages": {"jax": "0.10", "torch": "2.13", "transformers": "5.0"},
        },
        "settings": {"budget_tokens": 1024, "max_tokens": 5600, "steps": 64},
    }
    speed = {"context": 4096, "batch": 1, "prefill_s": 1.0, "rounds": 2, "compile_s": 3.0}
    speed |= {"peak_bytes": 2e9, "device_kv_bytes": 138e6, "tokens_per_s": 9.0}
    closeness = {"kl": 0.0152, "kl_low": 0.0121, "kl_high": 0.0188, "agreement": 0.945}
    closeness |= {"device_mb": 100.0, "documents": 30, "tokens": 1900}
    sizes = dict.fromkeys(memory.COLUMNS[2:], 10.0)
    rows = {
        "compare": [
            {"system": "transformers", "decode_ms": 102.0, "low_ms": 99.0, "high_ms": 110.0}
            | speed,
            {"system": "flexi", "decode_ms": 36.04, "low_ms": 35.0, "high_ms": 37.0} | speed,
            speed
            | {"system": "full", "decode_ms": 53.0, "low_ms": 53.0, "high_ms": 53.0}
            | {"device_kv_bytes": 368e6},
        ],
        "closeness": [{"config": "flexi"} | closeness],
        "memory": [
            {"system": name, "context": context} | sizes
            for name in memory.POLICIES
            for context in (1024, 2048)
        ],
        "kernels": [{"kernel": "add_norm", "checks": "2/2", "ms": 1.0, "share": 0.5}],
        "accuracy": [{"config": "flexi", "retention": 0.99, "low": 0.9, "high": 1.1}],
        "simulate": [
            {"workload": "offline", "config": "full", "new_tokens": 9, "tokens_per_s": 5.0},
            {"workload": "online", "config": "full", "rate": 0.5, "tpot_ms": 5.0},
        ],
    }
    ratio = {"system": "flexi", "context": 4096, "batch": 1, "decode_ms": 2.83, "prefill_s": 1.0}
    for bench, mine in rows.items():
        extra = {
            "compare": {"ratios": [ratio], "wrong": {"quest": "says 4"}},
            "accuracy": {"by_task": [{"task": "needles", "left_out": "full scores 0"}]},
            "simulate": {"caption": "Prediction", "sensitivity": [{"assumption": "bandwidth"}]},
        }.get(bench, {})
        command = f"python -m bench.{bench} --rounds 2"
        content = {"bench": bench, "command": command, "rows": mine, **about, **extra}
        (folder / f"a_{bench}.json").write_text(json.dumps(content))
    (folder / "other.json").write_text("[1]")


@needs_matplotlib
def test_a_report_has_all_results_and_their_pictures(tmp_path, capsys):
    results_in(tmp_path)
    page = tmp_path / "README.md"
    marks = "<!-- headline -->\nold\n<!-- /headline -->\nbetween\n<!-- results --><!-- /results -->"
    page.write_text(f"before\n{marks}\nafter\n")
    assert report.main([str(tmp_path), "--readme", str(page)]) == 0
    text, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for bench in ("compare", "closeness", "memory", "kernels", "accuracy", "simulate"):
        assert f"## bench.{bench}: a_{bench}" in text
        assert (tmp_path / f"a_{bench}.png").read_bytes().startswith(b"\x89PNG")
        assert f"`python -m bench.{bench} --rounds 2`" in text
    assert html.count("data:image/png;base64,") == 6
    assert "a &lt;fast&gt; one" in html and "a <fast> one" not in html
    assert "Not shown, since they were wrong: {'quest': 'says 4'}" in text
    assert "| needles | full scores 0 |" in text
    assert "\nPrediction\n" in text and "Prediction: how many times as good" in text
    readme = page.read_text()
    assert readme.startswith("before\n") and readme.endswith("<!-- /results -->\nafter\n")
    assert "\nbetween\n" in readme and "old" not in readme
    assert "- **0.015 nats** from full attention" in readme
    assert "- **138 MB instead of 368 MB** of keys" in readme
    assert "- **2.8 times as fast** per token as transformers" in readme
    assert "| `flexi` | 36 [35, 37] | 2.8 | 1 | 138 | 2 |" in readme
    assert "| `flexi` | 0.0152 [0.0121, 0.0188] | 94.5 % | 100 |" in readme
    assert readme.index("`flexi`") < readme.index("transformers, dynamic cache")
    assert report.main([str(tmp_path), "--readme", str(page)]) == 0
    assert page.read_text() == readme


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    results_in(tmp_path)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda _: None)
    assert report.main([str(tmp_path)]) == 0
    assert report.NO_PICTURES in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_a_folder_without_results_is_no_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "holds no result" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no place for results"):
        report.in_readme("nothing", {"results": "x"})


def test_kernels_are_right_before_they_are_timed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "found.json"
    assert (
        kernels.main(["--quick", "--kernels", "add_norm", "page_scores", "--json", str(path)]) == 0
    )
    out = capsys.readouterr().out.split()
    assert "add_norm" in out and "ms" not in out
    found = json.loads(path.read_text())
    assert [part["name"] for part in found["parts"]] == ["bandwidth", "add_norm", "page_scores"]
    assert all(part["status"] == "passed" for part in found["parts"])
    assert found["settings"]["sizes"]["batch"] == 4 and found["environment"]["commit"] is not None


def test_a_kernel_that_is_wrong_has_no_time(tmp_path, monkeypatch, capsys):
    """A row at a time, since a case is compiled once for all."""
    right = kernels.PARTS["add_norm"]

    def wrong(part, sizes):
        part.check("nought is one", False)
        right(part, sizes)

    monkeypatch.setitem(kernels.PARTS, "add_norm", wrong)
    path = tmp_path / "found.json"
    assert kernels.main(["--quick", "--kernels", "add_norm", "--json", str(path)]) == 1
    row = json.loads(path.read_text())["rows"][-1]
    assert (row["kernel"], row["of"]) == ("add_norm", "FAILED")
    assert "ms" not in row


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs the torch extra"
)
def test_memory_is_as_predicted(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert memory.main(["--quick", "--json", str(path), "--policies", "flexi"]) == 0
    [row] = json.loads(path.read_text())["rows"]
    assert row["allocated_bytes"] == row["predicted_bytes"]
    assert row["cache_bytes"] >= row["closed_bytes"]
    assert min(row["arrays_bytes"], row["peak_bytes"], row["host_bytes"]) > 0
    of_a_head = 2 * 8 * 4  # key and value of a token
    assert row["full_bytes"] == 304 * 4 * of_a_head
    # Three of four heads keep the budget and what comes in a rerank interval.
    assert row["closed_bytes"] == (300 + 3 * (64 + 16)) * of_a_head


def test_memory_that_is_not_as_predicted_is_not_shown():
    row = {"system": "flexi", "context": 64, "allocated_bytes": 5, "predicted_bytes": 5}
    row |= {"cache_bytes": 110, "closed_bytes": 100}
    assert memory.wrong([row]) == []
    assert "not 6" in memory.wrong([row | {"predicted_bytes": 6}])[0]
    assert "closed form" in memory.wrong([row | {"cache_bytes": 200}])[0]
