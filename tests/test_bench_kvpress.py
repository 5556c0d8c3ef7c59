"""Our ranks against kvpress' PyTorch code where it is installed, and how that bench compares."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from bench import kvpress_ranks

pytestmark = pytest.mark.any_jax

ROW = {"method": "h2o", "press": "P", "tokens": 3, "kept": 2, "heads": 1}


def test_the_ranks_equal_those_of_kvpress(repository):
    if importlib.util.find_spec("kvpress") is None:
        pytest.skip(kvpress_ranks.INSTALL)
    # Importing kvpress changes transformers' attention functions, so not in this process.
    command = [sys.executable, "-m", "bench.kvpress_ranks"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for method in ("streaming_llm", "snapkv", "h2o"):
        assert done.stdout.count(method) == len(kvpress_ranks.SIZES)


def test_a_missing_kvpress_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    assert kvpress_ranks.main([]) == 2
    assert "pip install kvpress" in capsys.readouterr().err


def test_compare_by_hand():
    ours = np.array([[1.0, 2.0, 4.0, np.inf], [8.0, 1.0, 2.0, np.inf]])
    theirs = np.array([[1.0, 2.5, 4.0, 9.0], [8.0, 1.0, 2.0, 9.0]])
    found = kvpress_ranks.compare("snapkv", ours, theirs, room=2)
    assert found["max_difference"] == pytest.approx(0.2)
    assert found["same_kept"]
    assert (found["tokens"], found["kept"], found["heads"]) == (4, 2, 2)
    theirs[0, 1] = 5.0
    assert not kvpress_ranks.compare("snapkv", ours, theirs, room=2)["same_kept"]
    assert kvpress_ranks.best(ours, 2).tolist() == [
        [False, False, True, True],
        [True, *[False] * 2, True],
    ]


@pytest.mark.parametrize(
    ("difference", "same", "code"),
    [(1e-6, True, 0), (1e-4, True, 1), (float("nan"), True, 1), (1e-6, False, 1)],
)
def test_a_difference_ends_with_one(difference, same, code, monkeypatch, capsys):
    row = ROW | {"max_difference": difference, "same_kept": same}
    monkeypatch.setitem(sys.modules, "kvpress", sys)
    monkeypatch.setattr(kvpress_ranks, "measure", lambda *_, **__: [row])
    assert kvpress_ranks.main([]) == code
    assert ("yes" if same else "no") in capsys.readouterr().out
