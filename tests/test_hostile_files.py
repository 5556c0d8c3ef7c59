"""No file, however hostile, costs more time or memory than its size warrants.

Each is read in a child process that is held to 200 MB beyond the file's size and a second: one
clear ValueError, or a right answer.
"""

import json
import os
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest

from flexijax.models.checkpoint import MARKER, save
from flexijax.models.load import load
from tests.hostile_child import CONFIG
from tests.model_files import hf_config, tensors, write_gguf, write_hf

pytestmark = [
    pytest.mark.any_jax,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="the limits of the child are Linux's"
    ),
]


def child(*arguments: str) -> list:
    command = [sys.executable, "-m", "tests.hostile_child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def rewritten(path, change) -> None:
    """Changes the header of a safetensors file in place."""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])


def offsets(header, name, start, stop):
    header[f"{name}.weight"]["data_offsets"] = [start, stop]


def claims_four_gigabytes(folder):
    path = folder / "model.safetensors"
    path.write_bytes((4 << 30).to_bytes(8, "little"))
    os.truncate(path, 5 << 30)  # sparse


def claims_a_whole_file_of_zeros(folder):
    path = folder / "model.safetensors"
    path.write_bytes((90 << 20).to_bytes(8, "little"))
    os.truncate(path, 91 << 20)


def of_a_million_lists(folder):
    text = b'{"a":[' + b"[]," * 1_100_000 + b"[]]}"
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def an_index_that_names(name):
    def write(folder):
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def a_config_with(**changes):
    def write(folder):
        (folder / "config.json").write_text(json.dumps(hf_config(CONFIG) | changes))

    return write


def in_place_of(name, make):
    def write(folder):
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def zero(path):
    path.symlink_to("/dev/zero")


FOLDERS = {
    "header of 4 GB": (claims_four_gigabytes, "header of 4294967296 bytes, the format's limit"),
    "header of zeros": (claims_a_whole_file_of_zeros, "truncated or not a safetensors file"),
    "header of lists": (of_a_million_lists, "header of more than"),
    "negative offsets": (
        lambda f: rewritten(f / "model.safetensors", lambda h: offsets(h, "model.norm", -64, 0)),
        "data_offsets [-64, 0]: must be [begin, end]",
    ),
    "offsets the wrong way round": (
        lambda f: rewritten(f / "model.safetensors", lambda h: offsets(h, "model.norm", 64, 0)),
        "data_offsets [64, 0]: must be [begin, end]",
    ),
    "overlapping offsets": (
        lambda f: rewritten(f / "model.safetensors", lambda h: offsets(h, "model.norm", 0, 64)),
        "its bytes overlap those of",
    ),
    "an index of another folder": (an_index_that_names("../other.safetensors"), "in this folder"),
    "an index of the root": (an_index_that_names("/etc/passwd"), "in this folder"),
    "an index of no string": (an_index_that_names(7), "weight_map must be an object of file"),
    "an activation of 10 MB": (a_config_with(hidden_act="x" * 10_000_000), "hidden_act='xxx"),
    "a family of 10 MB": (a_config_with(model_type="x" * 10_000_000), "model_type='xxx"),
    "a size of 10^4000": (a_config_with(hidden_size=10**4000), "hidden_size=1000"),
    "a million layers": (
        a_config_with(num_hidden_layers=1_000_000),
        "the config says 1000000 layers, and there are 12 tensors in all",
    ),
    "config.json is a FIFO": (in_place_of("config.json", os.mkfifo), "a FIFO, not a regular"),
    "config.json is /dev/zero": (in_place_of("config.json", zero), "a device, not a regular"),
    "weights are a FIFO": (in_place_of("model.safetensors", os.mkfifo), "a FIFO, not a regular"),
    "weights are /dev/zero": (in_place_of("model.safetensors", zero), "a device, not a regular"),
    "the index is a FIFO": (
        in_place_of("model.safetensors.index.json", os.mkfifo),
        "a FIFO, not a regular",
    ),
    "the marker is a FIFO": (in_place_of(MARKER, os.mkfifo), "a FIFO, not a regular"),
}


def a_marker_with(**changes):
    def write(folder):
        marker = json.loads((folder / MARKER).read_text())
        marker["config"] |= changes
        (folder / MARKER).write_text(json.dumps(marker))

    return write


CHECKPOINTS = {
    "a million layers": (
        a_marker_with(num_layers=1_000_000),
        "says 1000000 layers, and there are 9 arrays in all",
    ),
    "half a layer": (a_marker_with(num_layers=1.5), "num_layers=1.5: must be an integer"),
    "layers in words": (a_marker_with(num_layers="one"), "num_layers='one': must be an integer"),
    "a width of a list": (a_marker_with(hidden_size=[16]), "hidden_size=[16]: must be an integer"),
    "a width without end": (a_marker_with(hidden_size=2**31 - 2), "shape ("),
    "a yes that is a word": (a_marker_with(qk_norm="no"), "qk_norm='no': must be true or false"),
    "scaling of a list": (a_marker_with(rope_scaling=[1]), "rope_scaling=[1]: must be an object"),
    "a FIFO among the arrays": (
        lambda folder: os.mkfifo(folder / "params" / "array"),
        "'array' is not a regular file",
    ),
}


def a_gguf(path, *, head_dim=None, arch=None):
    """A file with rope_freqs; head_dim and arch are then changed in its bytes."""
    ones = {"rope_freqs.weight": np.ones(CONFIG.head_dim // 2, np.float32)}
    write_gguf(path, CONFIG, tensors(CONFIG) | ones)
    load(path)
    data = path.read_bytes()
    if head_dim is not None:
        key = b"llama.attention.key_length" + struct.pack("<I", 4)
        at = data.index(key) + len(key)
        data = data[:at] + struct.pack("<I", head_dim) + data[at + 4 :]
    if arch is not None:
        key = b"general.architecture" + struct.pack("<I", 8)
        at = data.index(key) + len(key)
        data = data[:at] + struct.pack("<Q", len(arch)) + arch + data[at + 8 + len("llama") :]
    path.write_bytes(data)


def numbers(count: int) -> bytes:
    """A header whose one entry is a list of `count` bytes, each an object in Python."""
    entry = struct.pack("<Q1sIIQ", 1, b"k", 9, 0, count) + bytes(count)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry


GGUFS = {
    "heads of 2^30": (
        lambda path: a_gguf(path, head_dim=2**30),
        "rope_freqs.weight: F32 (4,): must be F32 (536870912,)",
    ),
    "an architecture of 50 MB": (lambda path: a_gguf(path, arch=b"x" * 50_000_000), "architecture"),
    "ten million numbers": (lambda path: path.write_bytes(numbers(10_000_000)), "values at byte"),
    "a FIFO": (os.mkfifo, "a FIFO, not a regular"),
    "/dev/zero": (zero, "a device, not a regular"),
    "overlapping tensors": (
        lambda path: overlapping(path),
        "the bytes of tensor",
    ),
}


def overlapping(path):
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("one", "two"):
        writer.add_tensor(name, np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data, key = path.read_bytes(), b"two" + struct.pack("<IQI", 1, 32, 0)
    at = data.index(key) + len(key)
    assert data[at : at + 8] == struct.pack("<Q", 128)
    path.write_bytes(data[:at] + struct.pack("<Q", 64) + data[at + 8 :])


def test_each_known_attack_is_one_clear_error_at_no_cost(tmp_path):
    expected = {}
    for name, (write, message) in FOLDERS.items():
        folder = tmp_path / f"folder {name}".replace("/", " ")
        write_hf(folder, CONFIG, tensors(CONFIG))
        write(folder)
        expected[folder] = message
    write_hf(tmp_path / "hf", CONFIG, tensors(CONFIG))
    lm = load(tmp_path / "hf")
    for name, (write, message) in CHECKPOINTS.items():
        folder = tmp_path / f"checkpoint {name}"
        save(lm, folder)
        write(folder)
        expected[folder] = message
    for name, (write, message) in GGUFS.items():
        path = tmp_path / f"{name}.gguf".replace("/", " ")
        write(path)
        expected[path] = message
    found = child("paths", *map(str, expected))
    wrong = {
        path.name: answer[:600]
        for (path, message), answer in zip(expected.items(), found, strict=True)
        if message not in answer or answer.startswith("FAILED")
    }
    assert not wrong, json.dumps(wrong, indent=1)


# What reading one takes decides how many are tried: a checkpoint's arrays are asked of Orbax.
@pytest.mark.parametrize(
    ("kind", "count"),
    [("gguf", 200), ("safetensors", 200), ("config", 150), ("marker", 50), ("profile", 200)],
)
def test_damaged_files_of_every_kind(kind, count):
    (answers,) = child("fuzz", kind, str(count))
    assert sum(answers.values()) >= count * 0.9 and answers["refused"] > count / 4
