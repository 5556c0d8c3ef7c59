"""A run that was interrupted goes on where it was."""

import pytest

from flexijax.profiles.records import Records

pytestmark = pytest.mark.any_jax


def test_values_come_back_by_their_key(tmp_path):
    path = tmp_path / "records.jsonl"
    first = Records(path)
    assert first.get("a", 1) is None
    first.add("a", 1, value={"kl": 0.25})
    first.add("a", 2, value=[])
    # An interrupt in the middle of a line costs that line and no other.
    with path.open("a") as file:
        file.write('{"key": "half')
    second = Records(path)
    second.add("b", value=3)
    third = Records(path)
    assert third.get("a", 1) == {"kl": 0.25}
    assert third.get("a", 2) == []
    assert third.get("b") == 3
    assert third.get("a") is None


def test_without_a_file_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Records(None).add("a", value=1)
    assert Records(None).get("a") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line", ['{"text": "a document"}', "3", '{"key": [], "value": 1}', "[" * 100_000]
)
def test_a_file_of_other_things_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "documents.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="not a file of records"):
        Records(path)
    assert path.read_text() == line
