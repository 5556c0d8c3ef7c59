"""Reads hostile files in a process of its own, whose memory and time for each are limited.

python -m tests.hostile_child paths PATH...        one line of JSON for each: what load says
python -m tests.hostile_child fuzz KIND COUNT      a hypothesis run; the exit status tells
"""

import contextlib
import json
import math
import os
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import gguf
import jax
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flexijax.models.checkpoint import MARKER, save
from flexijax.models.decoder import Decoder
from flexijax.models.load import load
from flexijax.profiles.head_profile import HeadProfile
from tests.model_files import hf_config, tensors, write_gguf, write_hf
from tests.tiny_models import tiny_config

SPARE = 200 << 20  # bytes of memory beyond the file's size
SECONDS = 1.0  # of CPU time, which a busy machine does not lengthen
SMALL = dict(num_layers=1, vocab_size=11, hidden_size=16, intermediate_size=16, num_heads=2)
CONFIG = tiny_config("llama", num_kv_heads=1, **SMALL)


@contextlib.contextmanager
def limited(spare: int):
    """Holds this process to what it has now and `spare` bytes more."""
    with open("/proc/self/status") as lines:
        size = next(int(line.split()[1]) for line in lines if line.startswith("VmSize:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(read, path: Path) -> str:
    """What is wrong with the file, "" for nothing; raises where reading it costs too much."""
    size = 0
    if path.is_file():
        size = path.stat().st_size
    elif path.is_dir():
        size = sum(at.stat().st_size for at in path.rglob("*") if at.is_file())
    start, found = time.process_time(), ""
    with limited(SPARE + size):
        try:
            read(path)
        except ValueError as error:
            found = str(error)
    took = time.process_time() - start
    # A problem has at most 500 characters, and 40 of them are shown.
    assert len(found) < 41 * 510, f"an error of {len(found)} characters"
    assert took < SECONDS + size / 100e6, f"{took:.2f} s for {size} bytes: {found[:200]}"
    return found


def read_model(path: Path) -> None:
    """Loads; what loads must have the shapes of its own config and finite values."""
    lm = load(path)
    assert isinstance(lm.decoder, Decoder)
    expected = lm.decoder.abstract(dtype=np.float32)
    assert jax.tree.structure(expected) == jax.tree.structure(lm.params)
    for leaf, shape in zip(jax.tree.leaves(lm.params), jax.tree.leaves(expected), strict=True):
        assert leaf.shape == shape.shape and np.isfinite(np.asarray(leaf)).all()


def read_profile(path: Path) -> None:
    profile = HeadProfile.load(path)
    assert HeadProfile.from_json(profile.to_json()) == profile
    profile.check(num_layers=profile.num_layers, num_kv_heads=profile.num_kv_heads)


# Values that somebody may write where a size, a name or a list is expected.
INTEGERS = st.sampled_from([0, 1, -1, 2, 3, 8, 2**30, 2**31, 2**32, 2**63, 2**64 - 1, 10**400])
SCALARS = (
    st.none()
    | st.booleans()
    | INTEGERS
    | st.integers(-5, 70)
    | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 5e-324, 0.5, -0.0])
    | st.sampled_from(["", "llama", "F32", "../x", "\0", "x" * 100_000, "\u0663", "{" * 5000])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "F32", ""]), inner)
    ),
    max_leaves=8,
) | st.sampled_from([[[0] * 100_000], {"a": {"b": {"c": {}}}}])


@st.composite
def damaged_json(draw, whole: dict) -> bytes:
    """A JSON object with some values replaced, at any depth, or text that is none."""
    found = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, 3))):
        node = found
        while True:
            key = draw(st.sampled_from(sorted(node)))
            if isinstance(node[key], dict) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            if draw(st.integers(0, 9)):
                node[key] = json.loads(json.dumps(draw(JSON)))  # what is drawn is shared
            else:
                del node[key]
            break
        if not found:
            break
    text = json.dumps(found).encode()
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return b"[" * 50_000
    if kind == 2:
        return text[: draw(st.integers(0, len(text)))]
    return text


@st.composite
def safetensors(draw, whole: bytes) -> bytes:
    size = int.from_bytes(whole[:8], "little")
    header, body = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    text = draw(damaged_json(header))
    claimed = draw(st.sampled_from([len(text)] * 6 + [0, 2**32, 2**64 - 1, len(text) + 1]))
    return claimed.to_bytes(8, "little") + text + body


def packed(value) -> bytes:
    text = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text


@st.composite
def gguf_value(draw, depth: int = 0) -> bytes:
    """(type, value) of a metadata entry."""
    kind = draw(st.integers(0, 13) if depth < 6 else st.integers(0, 8))
    if kind == 8:
        text = draw(st.sampled_from(["", "llama", "yarn", "x" * 100_000, "qwen2"]))
        claim = draw(st.sampled_from([None] * 5 + [2**40, 2**64 - 1]))
        return struct.pack("<I", 8) + (packed(text) if claim is None else struct.pack("<Q", claim))
    if kind == 9:
        count = draw(st.sampled_from([0, 1, 2, 3, 2**20, 2**31, 2**60]))
        entry = draw(gguf_value(depth=depth + 1))
        items = entry[4:] * min(count, 3)
        return struct.pack("<I", 9) + entry[:4] + struct.pack("<Q", count) + items
    size = {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)
    raw = draw(st.binary(min_size=size, max_size=size))
    small = draw(st.integers(0, 200)).to_bytes(size, "little")
    return struct.pack("<I", kind) + draw(st.sampled_from([raw, small]))


@st.composite
def gguf_file(draw, keys: dict[str, bytes], infos: list[tuple], body: bytes) -> bytes:
    """A file of known keys and tensors, of which some are replaced."""
    keys, infos = dict(keys), list(infos)
    for _ in range(draw(st.integers(0, 3))):
        keys[draw(st.sampled_from([*sorted(keys), *GGUF_KEYS]))] = draw(gguf_value())
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(infos) - 1))
        name, shape, kind, offset = infos[at]
        sizes = st.sampled_from([0, 1, 2, 8, 11, 16, 2**30, 2**40, 2**63, 2**64 - 1])
        infos[at] = (
            draw(st.sampled_from([name, name, "rope_freqs.weight", "", "x" * 1000])),
            draw(st.sampled_from([shape, draw(st.lists(sizes, max_size=5))])),
            draw(st.sampled_from([kind, draw(st.integers(0, 45))])),
            draw(st.sampled_from([offset, 0, 32, 2**40, 2**64 - 1])),
        )
    counts = [len(infos), len(keys)]
    for at in range(2):
        counts[at] = draw(st.sampled_from([counts[at]] * 8 + [0, 2**20, 2**63]))
    data = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    data += b"".join(packed(key) + value for key, value in keys.items())
    for name, shape, kind, offset in infos:
        data += packed(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        data += struct.pack("<IQ", kind, offset)
    data += b"\0" * (-len(data) % 32) + body
    return data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 19)) == 0 else data


GGUF_KEYS = [
    "general.alignment",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.attention.sliding_window",
    "llama.expert_count",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.merges",
]


def gguf_parts(path: Path) -> tuple[dict[str, bytes], list[tuple], bytes]:
    """The metadata of a file as bytes, its tensors as (name, shape, kind, offset), their data."""
    reader = gguf.GGUFReader(path)
    keys = {
        name: b"".join(part.tobytes() for part in field.parts[2:])
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    start = reader.data_offset
    infos = [
        (t.name, [int(n) for n in t.shape], int(t.tensor_type), t.data_offset - start)
        for t in reader.tensors
    ]
    return keys, infos, path.read_bytes()[start:]


def fuzz(kind: str, count: int, folder: Path) -> None:
    """`count` inputs of a kind; fails on the first that is neither refused nor right."""
    path, read = folder / "m", read_model
    if kind == "gguf":
        path = target = folder / "m.gguf"
        write_gguf(path, CONFIG, tensors(CONFIG))
        inputs = gguf_file(*gguf_parts(path))
    elif kind == "marker":
        write_hf(folder / "hf", CONFIG, tensors(CONFIG))
        save(load(folder / "hf"), path)
        target = path / MARKER
        inputs = damaged_json(json.loads(target.read_text()))
    elif kind == "profile":
        path = target = folder / "profile.json"
        read = read_profile
        rco = tuple((0.5, 0.25) for _ in range(3))
        HeadProfile(
            model="us/Toy",
            num_layers=3,
            num_kv_heads=2,
            unstable=((0, 0), (2, 1)),
            page_size=16,
            budget_pages=8,
            source="by hand",
            rco=rco,
            measured={"steps": 4, "rco_at_lag": {"4": rco, "8": rco}, "score": "minmax"},
        ).save(path)
        inputs = damaged_json(json.loads(path.read_text()))
    else:
        write_hf(path, CONFIG, tensors(CONFIG))
        target = path / ("config.json" if kind == "config" else "model.safetensors")
        if kind == "config":
            more = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "layer_types": None}
            inputs = damaged_json(hf_config(CONFIG) | more)
        else:
            inputs = safetensors(target.read_bytes())
    read(path)  # the whole file is right; and all that reading imports and starts is there
    answers = {"right": 0, "refused": 0}

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=inputs)
    def run(data):
        target.write_bytes(data)
        answers["refused" if check(read, path) else "right"] += 1

    run()
    print(json.dumps(answers))


def main(what: str, *args: str) -> None:
    if what == "fuzz":
        with tempfile.TemporaryDirectory() as folder:
            fuzz(args[0], int(args[1]), Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("hf", "m.gguf"):  # all that reading imports and starts
            writer = write_gguf if name.endswith("gguf") else write_hf
            writer(Path(folder) / name, CONFIG, tensors(CONFIG))
            load(Path(folder) / name)
        save(load(Path(folder) / "hf"), Path(folder) / "saved")
        load(Path(folder) / "saved")
    for path in args:
        try:
            print(json.dumps(check(load, Path(path))), flush=True)
        except Exception as error:
            print(json.dumps(f"FAILED {type(error).__name__}: {error}"[:1000]), flush=True)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
