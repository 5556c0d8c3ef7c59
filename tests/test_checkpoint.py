"""Saving a model and reading it back."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models import placement
from flexijax.models.checkpoint import MARKER, save
from flexijax.models.errors import LoadError
from flexijax.models.load import load
from tests import tiny_models
from tests.model_files import tensors, write_hf
from tests.test_tokenizer import byte_tokenizer

QK_NORMS = ("q_norm", "k_norm")


def test_a_saved_model_reads_back_equal(tmp_path):
    words = byte_tokenizer()
    lm = dataclasses.replace(tiny_models.tiny_model("llama-3.1"), tokenizer=words)
    save(lm, tmp_path / "m")
    again = load(tmp_path / "m")
    jax.tree.map(np.testing.assert_array_equal, lm.params, again.params)
    assert jax.tree.structure(lm.params) == jax.tree.structure(again.params)
    assert dataclasses.replace(again, params=None, tokenizer=None) == dataclasses.replace(
        lm, params=None, tokenizer=None
    )
    assert again.tokenizer is not None
    assert again.tokenizer.encode("the end<|end|>") == words.encode("the end<|end|>")
    assert load(tmp_path / "m", max_context=64).max_context == 64


def test_dtype_and_sharding_are_applied_while_reading(tmp_path):
    lm = tiny_models.tiny_model("qwen3")
    save(lm, tmp_path / "m")
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    again = load(tmp_path / "m", dtype="bfloat16", sharding=sharding)
    for ours, theirs in zip(jax.tree.leaves(lm.params), jax.tree.leaves(again.params), strict=True):
        assert theirs.dtype == jnp.bfloat16 and theirs.sharding == sharding
        np.testing.assert_array_equal(ours.astype(jnp.bfloat16), theirs)


TWO_DEVICES = """
import jax, numpy as np, sys
from jax.sharding import NamedSharding, PartitionSpec
from flexijax.models.load import load

mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

def rows(shape):
    return NamedSharding(mesh, PartitionSpec("x") if len(shape) > 1 else PartitionSpec())

whole = jax.tree.leaves(load(sys.argv[1]).params)
for source in sys.argv[1:]:
    halves = jax.tree.leaves(load(source, sharding=rows).params)
    for one, two in zip(whole, halves, strict=True):
        assert one.sharding.num_devices == 1 and two.sharding == rows(two.shape)
        sizes = [part.data.size for part in two.addressable_shards]
        assert sizes == [two.size // 2 if two.ndim > 1 else two.size] * 2
        np.testing.assert_array_equal(one, two)
print("sharded")
"""


def test_weights_are_sharded_over_devices(tmp_path):
    """Half of each matrix on each of two devices, from a checkpoint and from safetensors."""
    config = tiny_models.tiny_config("llama", vocab_size=98)
    write_hf(tmp_path / "hf", config, tensors(config))
    save(load(tmp_path / "hf"), tmp_path / "m")
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, str(tmp_path / "m"), str(tmp_path / "hf")],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    assert (done.returncode, done.stdout) == (0, "sharded\n"), done.stderr


class Foreign:
    """A user's own decoder."""


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    lm = tiny_models.tiny_model("llama")
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save(lm, tmp_path / "m")
    with pytest.raises(ValueError, match="lm.decoder is a Foreign"):
        save(dataclasses.replace(lm, decoder=Foreign()), tmp_path / "n")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_damaged_checkpoints_are_one_clear_error(tmp_path):
    save(tiny_models.tiny_model("llama"), tmp_path / "m")
    marker = tmp_path / "m" / MARKER
    text = marker.read_text()
    marker.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(LoadError, match="format 99"):
        load(tmp_path / "m")
    wrong = json.loads(text)
    wrong["config"] |= {"intermediate_size": 64, "qk_norm": True, "tie_embeddings": True}
    marker.write_text(json.dumps(wrong))
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    layers = [f"layers/{layer}" for layer in range(2)]
    assert sorted(caught.value.problems) == sorted(
        [
            "lm_head/kernel: the config has no place for it",
            *(f"missing array: {layer}/{norm}/scale" for layer in layers for norm in QK_NORMS),
            *(f"{at}/gate_up/kernel: shape (160, 48), the config says (128, 48)" for at in layers),
            *(f"{at}/down/kernel: shape (48, 80), the config says (48, 64)" for at in layers),
        ]
    )
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    marker.write_text("[]")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 2 + 1  # the marker's JSON, its content, the tokenizer


def test_values_that_overflow_the_dtype_are_refused(tmp_path):
    lm = tiny_models.tiny_model("llama")
    head = lm.params["lm_head"]["kernel"].at[3, 4].set(-70000.0)
    params = lm.params | {"lm_head": {"kernel": head}}
    save(dataclasses.replace(lm, params=params), tmp_path / "m")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m", dtype="float16")
    assert caught.value.problems == (
        "lm_head/kernel: its largest value, 70000, is infinite in float16: "
        "load with dtype='float32' or 'bfloat16'",
    )
    assert float(load(tmp_path / "m").params["lm_head"]["kernel"][3, 4]) == -70000.0


def test_what_does_not_fit_into_memory_is_refused(tmp_path, monkeypatch):
    save(tiny_models.tiny_model("llama"), tmp_path / "m")
    monkeypatch.setattr(placement, "available_host_bytes", lambda: 1000)
    with pytest.raises(LoadError, match="host memory: the weights take .* 1,000 bytes are avail"):
        load(tmp_path / "m")


DAMAGED = """
import sys
from flexijax.models.load import load
from flexijax.models.errors import LoadError

try:
    load(sys.argv[1])
except LoadError as error:
    print(len(error.problems), *error.problems)
"""


def test_a_checkpoint_cut_short_is_one_clear_error(tmp_path):
    """In a process of its own: reads that Orbax leaves behind complain whenever they end."""
    save(tiny_models.tiny_model("llama"), tmp_path / "m")
    largest = max((tmp_path / "m" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    command = [sys.executable, "-c", DAMAGED, str(tmp_path / "m")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 params: "), done.stdout
