"""`flexijax profile` from the files to the profile, the pictures and the report."""

import json

import pytest

from flexijax.cli import main as cli
from flexijax.cli import profile as cli_profile
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.report import TALK_OVERLAP
from tests.planted import planted_model, text_document

pytestmark = pytest.mark.any_jax

SIZES = ["--page-size", "4", "--steps", "32", "--max-tokens", "300", "--documents", "2"]


@pytest.fixture
def data(tmp_path):
    """Two tasks of three documents."""
    paths = []
    for task in ("reports", "meetings"):
        path = tmp_path / f"{task}.jsonl"
        rows = [{"input": text_document(task, seed).text} for seed in range(3)]
        path.write_text("\n".join(map(json.dumps, rows)))
        paths.append(str(path))
    return paths


@pytest.fixture
def model(monkeypatch):
    """Stands in for a model on the disk; its unstable heads."""
    lm, unstable = planted_model()
    monkeypatch.setattr(cli_profile, "load", lambda *_, **__: lm)
    return unstable


def test_profiles_pictures_and_report(data, model, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    out, pictures, result = tmp_path / "p.json", tmp_path / "pictures", tmp_path / "r.json"
    command = ["profile", "--model", "planted", "--data", *data, "--out", str(out), *SIZES]
    command += ["--skip", "1", "--budgets", "64", "32", "--plot", str(pictures)]
    command += ["--json", str(result)]
    assert cli.main(command) == 0
    profile = HeadProfile.load(out)
    assert profile.unstable == model
    assert profile.budget_pages == 16
    assert profile.fingerprint == "planted"
    assert profile.measured["documents"] == {"reports": 2, "meetings": 2}
    assert profile.measured["document_indices"] == {"reports": [1, 2], "meetings": [1, 2]}
    assert HeadProfile.load(tmp_path / "p.32.json").budget_pages == 8
    assert json.loads(result.read_text())["unstable_by_budget"]["8"] == [list(h) for h in model]
    stems = {path.stem for path in pictures.glob("*.svg")}
    assert stems == {path.stem for path in pictures.glob("*.png")}
    assert len(stems) == 6
    report = (pictures / "report.md").read_text()
    assert all(f"({stem}.svg)" in report for stem in stems)
    shown = capsys.readouterr().out
    for text in (report, shown):
        assert "Llama-3.1-8B-Instruct" in text
        assert "Split-half recall: 1.0," in text


BAD = {
    "--page-size 0": "--page-size=0 must be at least 1",
    "--page-size -4": "--page-size=-4 must be at least 1",
    "--budgets 30": "--budgets=[30] must be multiples of --page-size=4",
    "--budgets 0": "budgets=(0,) must each be at least 2 pages",
    "--fraction 2": "fraction=2.0",
    "--steps 0": "steps=0",
    "--documents 0": "--documents=0 must be at least 1",
    "--skip -1": "--skip=-1 must be at least 0",
    "--skip 3": "--skip=3 leaves no document of",
    "--steps 16": "steps=16",
    "--data /nowhere": "/nowhere",
    "--out /nowhere/p.json": "/nowhere/p.json",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_code_2_before_anything_loads(
    options, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(cli_profile, "load", None)
    command = ["profile", "--model", "m", "--data", *data, "--out", str(tmp_path / "p.json")]
    assert cli.main([*command, *SIZES, "--budgets", "64", *options.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert BAD[options] in err


def test_the_talks_table_is_symmetric():
    assert all(TALK_OVERLAP[a][b] == TALK_OVERLAP[b][a] for a in range(5) for b in range(5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--budgets", "30"], "multiples of --page-size=4"),
        (["--steps", "30"], "steps=30"),
        (["--documents", "0"], "--documents=0"),
        (["--window", "1"], "window=1"),
        (["--field", "nothing"], "no text in nothing"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(data, model, tmp_path, capsys, wrong, message):
    command = ["profile", "--model", "planted", "--data", *data, "--budgets", "64"]
    code = cli.main([*command, "--out", str(tmp_path / "p.json"), *SIZES, *wrong])
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_task_named_twice_is_refused(data, model, tmp_path, capsys):
    command = ["profile", "--model", "m", "--data", data[0], data[0], "--budgets", "64"]
    assert cli.main([*command, "--out", str(tmp_path / "p.json"), *SIZES]) == 2
    assert "twice" in capsys.readouterr().err
