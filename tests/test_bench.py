"""The machinery of the benches: medians, turns, fresh processes, gates and ratios."""

import json

import pytest

from bench import decode, timing
from bench.decode import Bench, Cell

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


def row(system, *, ms, peak=100, batch=1):
    values = {"prefill_s": 1.0, "decode_ms": ms, "peak_bytes": peak, "device_kv_bytes": 10}
    return {"system": system, "context": 64, "batch": batch, **values}


def test_ratios_say_how_many_times_better():
    rows = [row("flexi", ms=10.0, peak=50), row("transformers", ms=25.0), row("full", ms=20.0)]
    found = {one["ratio"]: one["value"] for one in decode.ratios(rows)}
    assert found["decode_ms: transformers / flexi"] == 2.5
    assert found["decode_ms: full / flexi"] == 2.0
    assert found["decode_ms: transformers / full"] == 1.25
    assert found["peak_bytes: transformers / flexi"] == 2.0
    assert not any("static" in name for name in found)


def test_medians_over_rounds():
    cell = Cell("flexi", 64, 1)
    runs = {cell: [row("flexi", ms=ms) for ms in (3.0, 1.0, 2.0)]}
    found = decode.medians(runs)[0]
    assert (found["decode_ms"], found["rounds"], found["batch"]) == (2.0, 3, 1)


class FakeBench(Bench):
    """Says the same tokens for every system but one."""

    def run(self, cell, *, steps=None):
        return {"tokens": [[1, 2, 4 if cell.system == "quest" else 3]]}


def test_the_gate_names_who_is_wrong(tmp_path):
    bench = FakeBench(tmp_path, [], 16, 1024, 2, None)
    assert decode.gate(bench, ("flexi", "full", "transformers")) == []
    wrong = decode.gate(bench, ("flexi", "quest", "transformers"))
    assert len(wrong) == 1
    assert wrong[0].startswith("quest says")


def test_wrong_tokens_show_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "in_fresh_process", lambda *_, **__: {"tokens": list(range(2000))})
    monkeypatch.setattr(decode, "Bench", FakeBench)
    code = decode.main(["--quick", "--systems", "flexi", "quest", "--json", str(tmp_path / "x")])
    out = capsys.readouterr()
    assert code == 1
    assert "the tokens are wrong" in out.err
    assert out.out == ""
    assert not (tmp_path / "x").exists()


class MeasuringBench(Bench):
    """Every system takes one millisecond more than the one before it."""

    def run(self, cell, *, steps=None):
        found = row(cell.system, ms=1.0 + decode.SYSTEMS.index(cell.system), batch=cell.batch)
        return {**found, "tokens": [[1]]}


def test_rows_ratios_and_environment_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decode, "in_fresh_process", lambda *_, **__: {"tokens": list(range(2000))})
    monkeypatch.setattr(decode, "Bench", MeasuringBench)
    path = tmp_path / "rows.json"
    sizes = ["--contexts", "64", "--batches", "1", "4", "--rounds", "2"]
    assert decode.main([*sizes, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert len(content["rows"]) == 2 * len(decode.SYSTEMS)
    assert {one["rounds"] for one in content["rows"]} == {2}
    assert {"system", "context", "batch", "prefill_s", "decode_ms", "peak_bytes"} <= set(
        content["rows"][0]
    )
    ratios = {one["ratio"]: one["value"] for one in content["ratios"] if one["batch"] == 4}
    assert ratios["decode_ms: transformers / flexi"] == 4.0
    assert content["environment"]["threads"] == 2
    assert "decode_ms: transformers / flexi" in capsys.readouterr().out


def test_requests_begin_in_different_places(tmp_path, monkeypatch):
    seen = {}

    def remember(module, spec, *, threads, lock):
        seen.update(spec, module=module)
        return {}

    monkeypatch.setattr(decode, "in_fresh_process", remember)
    bench = Bench(tmp_path, list(range(100)), 16, 1024, 2, None)
    bench.run(Cell("transformers_static", 40, 3))
    assert seen["module"] == "bench.transformers_side"
    assert seen["cache"] == "static"
    prompts = json.loads((tmp_path / "40x3.json").read_text())
    assert [prompt[0] for prompt in prompts] == [0, 20, 40]
    assert {len(prompt) for prompt in prompts} == {40}
    bench.run(Cell("flexi", 40, 3), steps=32)
    assert (seen["module"], seen["policy"]) == ("bench.flexijax_side", "flexi")
    assert seen["steps"] == 32


def test_any_method_can_be_measured():
    args = decode._parser().parse_args(["--systems", "snapkv", "transformers", "flexi"])
    assert args.systems == ["snapkv", "transformers", "flexi"]
    with pytest.raises(SystemExit):
        decode._parser().parse_args(["--systems", "flexy"])
