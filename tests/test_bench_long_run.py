"""The bench that counts what calls leave behind."""

import json

import pytest

from bench import long_run

pytestmark = pytest.mark.any_jax


def test_a_few_calls(tmp_path, capsys):
    assert long_run.main(["--quick", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["call"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens"] > 0 and row["executables"] > 0 for row in rows)
    assert "executables" in capsys.readouterr().out


def test_growth_is_found():
    def rows(last):
        level = {"memory_mb": 100.0, "maps": 50, "executables": 9, "threads": 4, "files": 7}
        return [level | {"files": 5}] * 3 + [level] * 3 + [level | last] * 3

    assert long_run.not_level(rows({})) == []
    assert long_run.not_level(rows({"memory_mb": 130.0, "files": 8})) == ["memory_mb"]
    assert long_run.not_level(rows({"files": 20})) == ["files"]
