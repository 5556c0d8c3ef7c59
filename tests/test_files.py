"""Files of a model's folder: what is no regular file, too large or too deep is refused."""

import json
import os
import socket

import pytest

from flexijax.models import files

pytestmark = pytest.mark.any_jax


def test_a_regular_file_is_read_through_a_link(tmp_path):
    (tmp_path / "blob").write_text('{"a": [1, "é"]}', encoding="utf-8")
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    assert files.read_json(tmp_path / "config.json") == {"a": [1, "é"]}
    assert files.read_text(tmp_path / "config.json").endswith('é"]}')
    with files.open_regular(tmp_path / "blob") as file:
        assert file.read(2) == b'{"'


def test_no_file_is_an_empty_object_but_a_dead_link_is_a_fault(tmp_path):
    assert files.read_json(tmp_path / "config.json") == {}
    (tmp_path / "config.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config.json: No such file"):
        files.read_json(tmp_path / "config.json")


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
    for name, kind in (
        ("fifo", "a FIFO"),
        ("zero", "a device"),
        ("folder", "a folder"),
        ("socket", "a socket"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {kind}, not a regular file"):
            files.read_json(tmp_path / name)


def test_size_is_bounded_before_it_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert files.read_bytes(path, 8) == b'{"a": 1}'
    with pytest.raises(ValueError, match="larger than 7 bytes"):
        files.read_bytes(path, 7)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(ValueError, match="larger than 16777216 bytes"):
        files.read_json(path)


@pytest.mark.parametrize("depth", [64, 65, 2000, 200_000])
def test_depth_is_bounded(tmp_path, depth):
    path = tmp_path / "a.json"
    path.write_text('{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}")
    if depth == 64:
        assert files.read_json(path)
    else:
        with pytest.raises(ValueError, match="a.json: nested deeper than 64"):
            files.read_json(path)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"{", "not valid JSON"),
        (b"[]", "must hold a JSON object, holds list"),
        (b'{"a": "\xff"}', "not UTF-8: invalid start byte at byte 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_broken_json_is_a_value_error_with_the_name(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: {says}"):
        files.read_json(tmp_path / "a.json")


def test_an_unreadable_name_is_a_value_error(tmp_path):
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError):
            files.read_text(tmp_path / name)


def test_values_are_echoed_short():
    assert files.short("abc") == "'abc'"
    for value in ("a" * 10**6, list(range(10**5)), 10**5000, {"k" * 10**6: ["v" * 10**6] * 9}):
        assert len(files.short(value)) <= 100
    assert json.loads(files.short(12)) == 12
