"""The GPU bench: every part at its tiny size, and what it does where something is wrong."""

import dataclasses
import itertools
import json
import sys

import jax
import numpy as np
import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import apart, bandwidth, data, kernels, memcheck, moves, report, small_model
from bench.gpu.parts import PARTS
from bench.gpu.report import Part, run_part
from bench.gpu.sizes import FULL, QUICK
from flexijax.pallas_kernels import platform


@pytest.fixture(scope="module", autouse=True)
def fast_compiling():
    """All that these parts take is compiling; how fast their programs run is of no interest."""
    if platform.is_gpu():
        yield
        return
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What the bench names for its processes is not for those of other tests."""
    monkeypatch.setenv(platform.PINNED_LIMIT, "64")


def run(name, function=None):
    """The record of one part at the tiny size."""
    function = function or PARTS[name]
    return run_part(name, lambda part: function(part, QUICK), report._silent).record()


@pytest.mark.slow
def test_every_part_passes_and_is_written(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--one-process", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert [part["name"] for part in content["parts"]] == list(PARTS)
    assert {part["status"] for part in content["parts"]} == {"passed"}
    assert all(part["checks"] for part in content["parts"])
    timed = {part["name"]: part["speeds"] for part in content["parts"] if part["speeds"]}
    assert set(timed) == {"bandwidth", *kernels.READING, "page_moves", "prompt", "decode"}
    assert all(speed["gb_per_s"] > 0 for speed in timed["bandwidth"])
    assert all(0 < timed[name][0]["share"] for name in (*kernels.READING, "page_moves"))
    step = timed["decode"][0]
    assert step["ms"] > 0 and step["roofline_ms"] > 0 and step["batch"] == QUICK.large_batch
    environment = content["environment"]
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["device"]["kind"] == jax.devices()[0].device_kind
    assert content["command"].startswith("python -m bench.gpu --quick")
    assert content["settings"]["pages"] == QUICK.pages and content["quick"]
    out = capsys.readouterr().out
    assert "decode step" in out and "FAILED" not in out


def spoilt(leaf):
    """Wrong in what a single request gets, or a last block, by a part in thirty at most."""
    if leaf.dtype.kind in "fV":
        return leaf.at[-1].multiply(leaf.dtype.type(1.03))
    return leaf.at[-1].add(leaf.dtype.type(1))


@pytest.mark.parametrize("name", kernels.READING)
def test_a_wrong_kernel_is_found_and_has_no_speed(name, monkeypatch):
    """Wrong in what it returns, then in what it updates in place."""
    make, calls = kernels.READING[name], itertools.count()

    def wrong(*args, **kwargs):
        case = make(*args, **kwargs)

        def function(state, *arguments):
            made = list(case.function(state, *arguments))
            filled = [at for at in (0, 1) if jax.tree.leaves(made[at])]
            at = filled[next(calls) % len(filled)]
            made[at] = jax.tree.map(spoilt, made[at])
            return made

        return dataclasses.replace(case, function=function)

    monkeypatch.setitem(kernels.READING, name, wrong)
    found = run(name)
    assert found["status"] == "FAILED" and not found["speeds"]
    assert len(found["checks"]) == 2 and not any(check["passed"] for check in found["checks"])


def test_a_page_lost_on_the_way_is_found(monkeypatch):
    def forgetful(transfer, slots, host, load):
        return moves.promote(*slots, host, load.at[0, 0, 0].set(-1), transfer=transfer)

    monkeypatch.setattr(moves, "promote_program", forgetful)
    for name in ("round_trips", "page_moves"):
        found = run(name)
        assert found["status"] == "FAILED" and not found["speeds"]


def test_unequal_tiers_are_counted(monkeypatch):
    seen = []
    compared_pages = small_model.compared_pages

    def spoilt(layout, cache):
        layer = cache.layer(0, 0)
        at = next(at for at, host in enumerate(layer.host) if host is not None)
        host, group = layer.host[at], layer.groups[at]
        page = int(np.asarray(group.slot_page)[0, 0].clip(0).min())
        block = int(cache.banks[0].standing.block_table[0, page])
        k = np.array(host.k)
        k[block, 0, 0, 0] += 1
        object.__setattr__(host, "k", jax.device_put(k, platform.sharding("pinned_host")))
        seen.append(compared_pages(layout, cache))
        return seen[-1]

    monkeypatch.setattr(small_model, "compared_pages", spoilt)
    assert run("tiers", small_model.tiers)["status"] == "FAILED"
    assert seen[0][0] > seen[0][1] == 1


def test_no_speed_without_a_check_that_held():
    part = Part("x")
    part.speed("too early", ms=1.0)
    part.check("held", True)
    part.speed("fine", ms=1.0)
    part.check("did not", False)
    part.speed("too late", ms=1.0)
    assert [speed["what"] for speed in part.speeds] == ["fine"]
    # A check that fails afterwards takes back what was noted before it.
    found = run("x", lambda part, _: (part.check("a", True), part.speed("b"), part.near("c", 2, 1)))
    assert (found["status"], found["speeds"]) == ("FAILED", [])


def test_a_part_that_breaks_says_where():
    found = run("x", lambda part, sizes: 1 / 0)
    assert found["status"] == "FAILED" and "ZeroDivisionError" in found["why"]
    assert report.broke(found) and "x FAILED" in report.summary([found])


def test_shares_are_of_the_copy_that_is_named():
    records = [
        {"name": "bandwidth", "speeds": [{"what": bandwidth.DEVICE, "gb_per_s": 200.0}]},
        {"name": "k", "speeds": [{"what": "k", "gb_per_s": 50.0, "of": bandwidth.DEVICE}]},
    ]
    report.add_shares(records)
    assert records[1]["speeds"][0]["share"] == 0.25


WRITES = """
import json, os, signal, sys, time
for name in sys.argv[2:]:
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        time.sleep(60)
    why = "an error" if name == "breaks" else ""
    record = {"name": name, "status": "FAILED" if why else "passed", "why": why}
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(record) + "\\n")
    if why:
        sys.exit(1)
"""


def test_a_part_that_takes_its_process_down_is_the_only_one_lost(tmp_path):
    started, written = [], []

    def command(names, lines):
        started.append(list(names))
        return [sys.executable, "-c", WRITES, str(lines), *names]

    names = ["a", "dies", "b", "breaks", "hangs", "c"]
    found = apart.run_apart(
        names,
        command,
        lines=tmp_path / "lines",
        seconds=2,
        write=lambda records: written.append(len(records)),
    )
    assert [record["name"] for record in found] == names
    assert [record["status"] == "passed" for record in found] == [
        True,
        False,
        True,
        False,
        False,
        True,
    ]
    assert "ended with -9" in found[1]["why"] and "longer than 2 s" in found[4]["why"]
    assert started == [names, names[2:], names[4:], names[5:]]
    assert written == sorted(written) and written[-1] == len(names)


def test_parts_run_in_a_process_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.chdir(tmp_path.parent)
    options = ["--quick", "--parts", "bandwidth", "--json", str(path)]
    repository = gpu.__file__.rpartition("/bench/")[0]
    monkeypatch.setenv("PYTHONPATH", repository)
    # This process may hold most of a GPU's memory.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    assert gpu.main(options) == 0
    content = json.loads(path.read_text())
    assert content["parts"][0]["speeds"] and content["environment"]["device"]["kind"]


def checker(folder, code):
    """A program that stands in for the memory checker and ends with `code`."""
    tool = folder / memcheck.TOOL
    tool.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: 0 errors'\nexit {code}\n")
    tool.chmod(0o755)


def test_memcheck_runs_the_tool_or_says_that_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("memcheck", memcheck.run)["status"] == "skipped"
    for code, status in ((0, "passed"), (99, "FAILED"), (1, "FAILED")):
        checker(tmp_path, code)
        assert run("memcheck", memcheck.run)["status"] == status


def test_more_is_pinned_unless_a_limit_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "available_host_bytes", lambda: 200 << 30)
    environ = {}
    gpu.pin_more(environ)
    assert environ == {platform.PINNED_LIMIT: "160"}
    environ = {platform.PINNED_LIMIT: "70"}
    gpu.pin_more(environ)
    assert environ == {platform.PINNED_LIMIT: "70"}


def test_full_sizes_are_those_of_production():
    assert (FULL.batch, FULL.pages, FULL.budget_pages, FULL.large_batch) == (16, 2048, 64, 16)
    lengths = data.odd_lengths(FULL.batch, 32768, 16)
    assert {0, 1, 15, 16, 17, 32767, 32768} <= set(lengths.tolist())
