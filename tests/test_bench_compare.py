"""`bench.compare`: gates, whom they let through, medians, ratios; and all of it, tiny."""

import importlib.util
import json

import numpy as np
import pytest

from bench import compare, sides
from bench.sides import Bench, Cell

pytestmark = pytest.mark.any_jax

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="the peers need the torch extra",
)


def row(system, *, ms, peak=100, batch=1):
    values = {"prefill_s": 1.0, "decode_ms": ms, "peak_bytes": peak, "device_kv_bytes": 10}
    return {"system": system, "context": 64, "batch": batch, "compile_s": 0.0, **values}


def test_medians_and_spread_over_rounds():
    cell = Cell("flexi", 64, 2)
    runs = {cell: [row("flexi", ms=ms) for ms in (3.0, 1.0, 2.5)]}
    [found] = compare.medians(runs)
    assert (found["decode_ms"], found["rounds"], found["batch"]) == (2.5, 3, 2)
    assert (found["low_ms"], found["high_ms"]) == (1.0, 3.0)
    assert found["tokens_per_s"] == 800


def test_ratios_are_to_the_best_setting_of_transformers():
    rows = [
        row("transformers", ms=30.0, peak=90),
        row("transformers_static", ms=20.0, peak=100),
        row("flexi", ms=10.0, peak=45),
        row("flexi", ms=10.0, batch=4),
    ]
    [found] = compare.ratios(rows)
    assert (found["system"], found["batch"], found["decode_ms"]) == ("flexi", 1, 2.0)
    assert found["peak_bytes"] == 2.0


def test_divergence_of_known_distributions():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    found = compare.divergence(np.log(p) + 7, np.log(q) - 3)
    assert found["kl"] == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1))
    assert found["agreement"] == 1.0
    assert compare.divergence(np.log(q), np.log(q))["kl"] == pytest.approx(0.0, abs=1e-12)


def test_those_that_must_agree_and_do_not_are_named():
    def pair(one, other, kl):
        return {"system": one, "other": other, "kl": kl}

    systems = ("transformers", "full", "flexi", "torch_flexi", "quest")
    rows = [
        pair("transformers", "full", 1e-6),
        pair("transformers", "flexi", 0.1),
        pair("transformers", "quest", 0.1),
        pair("flexi", "torch_flexi", float("nan")),
    ]
    assert list(compare.too_far(rows, systems)) == ["torch_flexi"]
    rows[0]["kl"] = 1e-3
    assert list(compare.too_far(rows, systems)) == ["full", "torch_flexi"]


def bench_of(folder, **changes):
    args = compare._parser().parse_args([])
    vars(args).update(changes)
    bench = Bench.of(args, folder)
    bench.token_ids = list(range(5000))
    return bench


def test_prompts_begin_in_different_places_and_are_measured_once(tmp_path, monkeypatch):
    seen = []

    def remember(module, spec, *, threads, lock):
        seen.append((module, spec))
        return {"number": len(seen)}

    monkeypatch.setattr(sides, "in_fresh_process", remember)
    bench = bench_of(tmp_path)
    bench.token_ids = list(range(100))
    assert bench.run(Cell("transformers_static", 40, 3))["number"] == 1
    prompts = json.loads((tmp_path / "40x3.json").read_text())
    assert [prompt[0] for prompt in prompts] == [0, 20, 40]
    assert {len(prompt) for prompt in prompts} == {40}
    bench.run(Cell("torch_flexi", 40, 3))
    bench.run(Cell("flexi", 40, 3), steps=32)
    (torch_side, static), (_, peer), (ours, flexi) = seen
    assert (torch_side, static["kind"]) == ("bench.torch_side", "static")
    assert (ours, flexi["policy"], flexi["steps"]) == ("bench.flexijax_side", "flexi", 32)
    assert sum(map(len, peer["unstable"])) == 22
    assert bench.run(Cell("transformers_static", 40, 3))["number"] == 1
    assert bench.run(Cell("transformers_static", 40, 3), turn=1)["number"] == 4


class FakeBench(Bench):
    """Everybody says the same but quest; each system takes one millisecond more."""

    def run(self, cell, *, steps=None, turn=0):
        ms = 1.0 + compare.DEFAULT.index(cell.system)
        tokens = [[1, 2, 4 if cell.system == "quest" else 3]]
        return row(cell.system, ms=ms, batch=cell.batch) | {"tokens": tokens}

    def feed(self, cell, tokens):
        path = self.folder / "logits.npy"
        np.save(path, np.eye(3))
        return str(path)

    def pages(self, context):
        return {"pages": 7, "steps": 64, "wrong": self.other_pages}

    def encode(self, text):
        return list(range(9000))

    other_pages: list = []


def run(tmp_path, monkeypatch, *args):
    monkeypatch.setattr(compare, "Bench", FakeBench)
    path = tmp_path / "found.json"
    systems = ["--systems", "transformers", "torch_flexi", "quest", "flexi"]
    code = compare.main([*systems, "--rounds", "2", "--json", str(path), *args])
    return code, json.loads(path.read_text())


def test_no_time_is_shown_of_a_system_that_is_wrong(tmp_path, monkeypatch, capsys):
    code, found = run(tmp_path, monkeypatch)
    assert code == 1
    assert list(found["wrong"]) == ["quest"]
    assert {one["system"] for one in found["rows"]} == {"transformers", "torch_flexi", "flexi"}
    assert {one["rounds"] for one in found["rows"]} == {2}
    out = capsys.readouterr()
    assert "quest is wrong" in out.err
    assert not any(line.split()[0] == "quest" for line in out.out.splitlines() if line.strip())
    assert found["environment"]["threads"] == 2


def test_other_pages_are_no_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeBench, "other_pages", ["other pages"])
    _, found = run(tmp_path, monkeypatch)
    assert {"torch_flexi", "quest"} <= set(found["wrong"])
    assert {one["system"] for one in found["rows"]} == {"transformers", "flexi"}


@needs_torch
def test_quick_passes_its_gates_and_shows_no_time(tmp_path, capsys):
    path = tmp_path / "found.json"
    systems = ("transformers", "transformers_static", "torch_flexi", "flexi")
    assert compare.main(["--quick", "--json", str(path), "--systems", *systems]) == 0
    found = json.loads(path.read_text())
    assert found["wrong"] == {} and found["rows"] == []
    assert found["pages"]["wrong"] == [] and found["pages"]["pages"] > 16 * 4 * 4
    kl = {(one["system"], one["other"]): one["kl"] for one in found["closeness"]}
    assert len(kl) == len(systems) * (len(systems) - 1)
    assert kl["transformers", "transformers_static"] < 1e-6 < kl["transformers", "flexi"]
    assert kl["flexi", "torch_flexi"] < 1e-6
    assert "ms" not in capsys.readouterr().out
