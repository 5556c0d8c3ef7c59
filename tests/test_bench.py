"""The machinery of the benches: medians, turns, fresh processes, what they write."""

import json
from pathlib import Path

import pytest

from bench import results, timing

pytestmark = pytest.mark.any_jax


def test_median_of_nothing_is_an_error():
    assert timing.median([3, 1, 2]) == 2
    with pytest.raises(ValueError, match="empty"):
        timing.median([])


def test_systems_take_turns():
    assert list(timing.interleaved("ab", rounds=2)) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]


def test_environment_is_json():
    found = timing.environment(threads=2)
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == 2
    assert "jax" in found["packages"]


def test_peak_is_of_the_child_alone():
    big = bytearray(200_000_000)
    big[::4096] = b"x" * len(big[::4096])
    child = timing.in_fresh_process("tests.bench_child", {"megabytes": 50}, threads=1)
    assert 50e6 < child["peak_bytes"] < 150e6 < timing.peak_bytes()
    assert child["cores"] == 1
    assert child["threads"] == "1"


def test_a_failing_process_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="megabytes must not be negative"):
        timing.in_fresh_process(
            "tests.bench_child", {"megabytes": -1}, threads=1, lock=tmp_path / "lock"
        )


def test_table_aligns():
    rows = [{"a": 1.23456, "b": "x"}, {"a": 1234.5, "b": None}]
    assert timing.table(rows, ("a", "b")) == "   a  b\n1.23  x\n1234  -"


def test_what_is_asked_of_a_side(tmp_path):
    def measure(*, prompts, steps=1):
        return {"prompts": prompts, "steps": steps}

    def other(*, steps):
        return {"other": steps}

    (tmp_path / "prompts").write_text("[[1, 2]]")
    spec = {"prompts_file": str(tmp_path / "prompts"), "steps": 3}
    assert timing.answered(spec, measure, other) == {"prompts": [[1, 2]], "steps": 3}
    assert timing.answered({"call": "other", "steps": 4}, measure, other) == {"other": 4}


def test_results_say_what_they_were_found_with(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--data", "/home/me/task.jsonl", "--rounds", "2"])
    path = tmp_path / "found.json"
    args = {"json": path, "data": [Path("/home/me/task.jsonl")], "rounds": 2}
    results.write(path, "throughput", args, rows=[{"a": float("nan")}])
    found = json.loads(path.read_text())
    assert found["command"] == "python -m bench.throughput --data task.jsonl --rounds 2"
    assert found["settings"] == {"data": ["task.jsonl"], "rounds": 2}
    assert (found["bench"], found["rows"]) == ("throughput", [{"a": None}])
    machine = found["environment"]
    assert machine["packages"]["jax"] and machine["cpu"] and machine["memory_bytes"] > 2**28
    assert machine["commit"] is None or len(machine["commit"].removesuffix("-dirty")) == 40
    assert list(tmp_path.iterdir()) == [path]
    results.write(None, "throughput", args, rows=[])
