"""Loading .gguf files: every type, every family, and files that are damaged or of another kind."""

import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models.decoder import Decoder
from flexijax.models.errors import LoadError
from flexijax.models.load import load
from tests import tiny_models
from tests.model_files import tensors, write_gguf, write_hf
from tests.test_tokenizer import BYTES, byte_metadata

pytestmark = pytest.mark.any_jax

WIDE = dict(hidden_size=256, intermediate_size=256, head_dim=32, num_heads=8, num_layers=1)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral-wide", "qwen2", "qwen3"])
def test_gguf_and_safetensors_give_the_same_params(name, tmp_path):
    config = tiny_models.tiny_config(name)
    named = tensors(config)
    write_hf(tmp_path / "hf", config, named)
    write_gguf(tmp_path / "m.gguf", config, named)
    seen = []
    ours = load(tmp_path / "hf", progress=seen.append)
    theirs = load(tmp_path / "m.gguf")
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    assert ours.fingerprint == theirs.fingerprint
    assert ours.tokenizer is None
    assert seen == sorted(seen) and seen[-1] == 1.0
    expected = Decoder(config).abstract(dtype=jnp.float32)
    assert jax.tree.structure(ours.params) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), ours.params, expected)


def kinds(works) -> list[gguf.GGMLQuantizationType]:
    """The types for which works(kind) does not raise."""
    found = []
    for kind in gguf.GGMLQuantizationType:
        try:
            works(kind)
        except (NotImplementedError, KeyError):
            continue
        found.append(kind)
    return found


def packed_rows(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random blocks of a type; bytes below 50 make scales that are finite: uint8[rows, ...]."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (rows, columns // block * size)
    return np.random.default_rng(0).integers(0, 50, shape, dtype=np.uint8)


WRITTEN = kinds(lambda kind: gguf.quantize(np.ones((1, 256), np.float32), kind))
READ = kinds(lambda kind: gguf.dequantize(packed_rows(kind, 1, 256), kind))


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.name)
def test_every_type_that_gguf_can_write_is_read(kind, tmp_path):
    config = tiny_models.tiny_config("qwen2", **WIDE)
    named = tensors(config)
    write_gguf(tmp_path / "m.gguf", config, named, kind=kind)
    lm = load(tmp_path / "m.gguf")
    expected = gguf.dequantize(gguf.quantize(named["lm_head.weight"], kind), kind)
    np.testing.assert_array_equal(np.asarray(lm.params["lm_head"]["kernel"]), expected)


@pytest.mark.parametrize("kind", sorted(set(READ) - set(WRITTEN)), ids=lambda kind: kind.name)
def test_types_that_gguf_only_reads_are_read(kind, tmp_path):
    """Only llama.cpp can write these."""
    config = tiny_models.tiny_config("qwen2", **WIDE)
    named = tensors(config)
    del named["lm_head.weight"]
    rows = packed_rows(kind, config.vocab_size, config.hidden_size)
    write_gguf(tmp_path / "m.gguf", config, named, packed={"output.weight": (rows, kind)})
    head = np.asarray(load(tmp_path / "m.gguf").params["lm_head"]["kernel"])
    np.testing.assert_array_equal(head, gguf.dequantize(rows, kind))
    assert np.abs(head).max() > 0


def test_a_type_that_gguf_does_not_read_is_named(tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_K
    assert kind not in READ
    config = tiny_models.tiny_config("qwen2", **WIDE)
    named = tensors(config)
    del named["lm_head.weight"]
    rows = packed_rows(kind, config.vocab_size, config.hidden_size)
    write_gguf(tmp_path / "m.gguf", config, named, packed={"output.weight": (rows, kind)})
    with pytest.raises(LoadError, match="output.weight: type Q8_K cannot be dequantised"):
        load(tmp_path / "m.gguf")


def test_llama_3_frequencies_of_a_gguf_become_a_config(tmp_path):
    config = tiny_models.tiny_config("llama", head_dim=64, num_heads=2, rope_theta=500000.0)
    frequency = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    turns = 8192 * frequency / (2 * np.pi)
    keep = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / (keep + (1 - keep) / 32)).astype(np.float32)
    named = tensors(config)
    write_gguf(tmp_path / "m.gguf", config, named | {"rope_freqs.weight": divisors})
    decoder = load(tmp_path / "m.gguf").decoder
    assert isinstance(decoder, Decoder)
    scaling = decoder.config.rope_scaling
    assert scaling is not None and scaling.kind == "llama3"
    assert scaling.factor == pytest.approx(32)
    strange = {"rope_freqs.weight": np.linspace(1, 3, 32, dtype=np.float32)}
    write_gguf(tmp_path / "n.gguf", config, named | strange)
    with pytest.raises(LoadError, match="a kind other than Llama 3's"):
        load(tmp_path / "n.gguf")


def test_a_gguf_of_another_kind_is_refused(tmp_path):
    config, path = tiny_models.tiny_config("llama"), tmp_path / "m.gguf"
    named = tensors(config)
    for metadata, message in (
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"rope.dimension_count": 4}, "rope.dimension_count=4: must be 8"),
        ({"expert_count": 8}, "expert_count=8"),
        ({"attention.sliding_window": 64}, "sliding_window=64"),
    ):
        write_gguf(path, config, named, metadata=metadata)
        with pytest.raises(LoadError, match=message):
            load(path)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(LoadError, match="architecture 'gpt2': must be llama"):
        load(path)


def test_damaged_gguf_files_are_one_clear_error(tmp_path):
    config, path = tiny_models.tiny_config("llama"), tmp_path / "m.gguf"
    write_gguf(path, config, tensors(config))
    whole = path.read_bytes()
    for length in (0, 3, 20, 100, 700):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="truncated or not a GGUF file"):
            load(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(LoadError, match="the file ends .* bytes early"):
        load(path)
    path.write_bytes(whole.replace(b"GGUF", b"JUNK", 1))
    with pytest.raises(LoadError, match="does not begin with 'GGUF'"):
        load(path)
    huge = bytearray(whole)
    huge[8:16] = struct.pack("<Q", 2**60)  # the count of tensors
    path.write_bytes(bytes(huge))
    with pytest.raises(LoadError, match="truncated or not a GGUF file"):
        load(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    """A file of one layer with a tokenizer in it."""
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    config = tiny_models.tiny_config("llama", num_layers=1, vocab_size=len(BYTES) + 4)
    write_gguf(path, config, tensors(config), words=byte_metadata())
    assert load(path).tokenizer is not None
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_never_crash(seed, whole, tmp_path):
    """Whatever is wrong is a LoadError, and found without taking the memory that it may claim."""
    rng, path = np.random.default_rng(seed), tmp_path / "m.gguf"
    header = whole.index(b"blk.0.attn_norm.weight") + 800
    for _ in range(50):
        broken = bytearray(whole)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            broken[at] = rng.integers(0, 256)
        path.write_bytes(bytes(broken))
        try:
            load(path)
        except LoadError:
            pass


def test_metadata_of_the_wrong_kind_is_one_clear_error(tmp_path):
    config, path = tiny_models.tiny_config("llama", vocab_size=len(BYTES) + 4), tmp_path / "m.gguf"
    named = tensors(config)
    wrong = byte_metadata(merges=["t h", "no-such pair"], eos_token_id=99999)
    write_gguf(path, config, named, words=wrong, metadata={"rope.dimension_count": 4})
    with pytest.raises(LoadError) as caught:
        load(path)
    config_problem, tokenizer_problem = caught.value.problems
    assert "rope.dimension_count=4" in config_problem
    assert tokenizer_problem.startswith("tokenizer: tokenizer.ggml: ")
    assert "no-such" in tokenizer_problem
    write_gguf(path, config, named, words=byte_metadata(tokens=[1, 2], token_type=None))
    with pytest.raises(
        LoadError, match=r"tokenizer: tokenizer.ggml.tokens=\[1, 2\]: must be texts"
    ):
        load(path)


def test_a_count_of_layers_in_the_billions_is_refused_at_once(tmp_path):
    config, path = tiny_models.tiny_config("llama"), tmp_path / "m.gguf"
    write_gguf(path, config, tensors(config))
    key = b"llama.block_count" + struct.pack("<II", 4, 2)
    assert key in path.read_bytes()
    huge = key[:-4] + struct.pack("<I", 2**30 + 2)
    path.write_bytes(path.read_bytes().replace(key, huge))
    with pytest.raises(LoadError, match="the config says 1073741826 layers, and there are 21 tens"):
        load(path)


def test_nesting_without_end_is_refused(tmp_path):
    """Arrays of arrays of arrays: each level takes twelve bytes."""
    path, string = tmp_path / "m.gguf", struct.pack("<Q1s", 1, b"k")
    nested = struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQB", 0, 1, 0)
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string + struct.pack("<I", 9) + nested
    )
    with pytest.raises(LoadError, match="truncated or not a GGUF file: arrays nested deeper"):
        load(path)
