"""Where a text ends: generation_config.json before config.json, and never an id without a token."""

import json
import os

import pytest

import flexijax
from flexijax.engine.requests import make_requests
from flexijax.models import end_of_text
from flexijax.models.checkpoint import save
from flexijax.models.load import load
from flexijax.models.weights import LoadError
from tests import tiny_models
from tests.model_files import hf_config, tensors, write_gguf, write_hf
from tests.test_tokenizer import BYTES, byte_metadata, byte_tokenizer

pytestmark = pytest.mark.any_jax


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, set()),
        ({"config": {"eos_token_id": 7}}, {7}),
        ({"config": {"eos_token_id": [7, 8]}}, {7, 8}),
        ({"generation_config": {"eos_token_id": 3}, "config": {"eos_token_id": 7}}, {3}),
        ({"generation_config": {"eos_token_id": [3, 4]}, "config": {"eos_token_id": 7}}, {3, 4}),
        ({"generation_config": {}, "config": {"eos_token_id": 7}}, {7}),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 7}}, {7}),
    ],
)
def test_the_first_file_that_names_one_decides(files, expected, tmp_path):
    assert end_of_text.stop_ids(write(tmp_path, **files)) == expected


@pytest.mark.parametrize("wrong", ["7", -1, True, 2.5, [3, None], {"a": 1}, [[3]]])
def test_what_is_no_id_is_refused_by_its_key(wrong, tmp_path):
    write(tmp_path, generation_config={"eos_token_id": wrong})
    with pytest.raises(ValueError, match="generation_config.json: eos_token_id=.*must be a token"):
        end_of_text.stop_ids(tmp_path)


def folder(tmp_path, **files):
    config = tiny_models.tiny_config("llama", vocab_size=len(BYTES) + 4)
    write_hf(tmp_path / "m", config, tensors(config))
    return write(tmp_path / "m", **files)


def test_a_folder_without_a_tokenizer_ends_where_its_files_say(tmp_path):
    path = folder(tmp_path, generation_config={"eos_token_id": [9, 11]})
    lm = load(path)
    assert lm.tokenizer is None and lm.end_ids == {9, 11}
    (request,) = make_requests(lm, [[5, 6, 7]], 3, flexijax.Sampling(stop_ids=(2,)))
    assert request.stop_ids == (2, 9, 11)
    (request,) = make_requests(lm, [[5, 6, 7]], 3, flexijax.Sampling(ignore_eos=True))
    assert request.stop_ids == ()
    save(lm, tmp_path / "saved")
    assert load(tmp_path / "saved").end_ids == {9, 11}


def test_an_id_without_a_token_is_refused_when_loading(tmp_path):
    path = folder(tmp_path, generation_config={"eos_token_id": 100_000_000_000})
    says = "eos_token_id 100000000000: not in 0..259"
    with pytest.raises(LoadError, match=says):
        load(path)
    (path / "config.json").write_text(
        json.dumps(hf_config(tiny_models.tiny_config("llama", vocab_size=260)))
    )
    byte_tokenizer().save(path)
    assert load(path).end_ids == {1}
    write(path, generation_config={"eos_token_id": [1, 100_000_000_000]})
    with pytest.raises(LoadError, match=says):
        load(path)
    write(path, generation_config={"eos_token_id": 1})
    save(load(path), tmp_path / "saved")
    write(tmp_path / "saved", generation_config={"eos_token_id": 100_000_000_000})
    with pytest.raises(LoadError, match=says):
        load(tmp_path / "saved")


def test_a_gguf_id_without_a_token_is_refused(tmp_path):
    config = tiny_models.tiny_config("llama", vocab_size=len(BYTES) + 4)
    words = byte_metadata(eos_token_id=4_000_000_000)
    write_gguf(tmp_path / "m.gguf", config, tensors(config), words=words)
    with pytest.raises(LoadError, match="tokenizer.ggml.eos_token_id=4000000000: must be a token"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
    ],
)
@pytest.mark.parametrize("kind", ["FIFO", "device", "folder", "nowhere"])
def test_what_is_no_file_is_refused_at_once(name, kind, tmp_path):
    path = folder(tmp_path)
    byte_tokenizer().save(path)
    (path / name).unlink(missing_ok=True)
    if kind == "FIFO":
        os.mkfifo(path / name)
    elif kind == "device":
        (path / name).symlink_to("/dev/zero")
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to(path / "not there")
    with pytest.raises(LoadError, match=f"{name}: (a |No such file)"):
        load(path)
