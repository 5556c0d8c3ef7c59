"""Saving a model and reading it back."""

import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models.checkpoint import MARKER, save
from flexijax.models.load import load
from flexijax.models.weights import LoadError
from tests import tiny_models
from tests.test_tokenizer import byte_tokenizer


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


class Foreign:
    """A user's own decoder."""

    def hidden(self, params, tokens, positions, attend, state):
        return tokens, state

    def logits(self, params, x):
        return x


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    lm = tiny_models.tiny_model("llama")
    (tmp_path / "m").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        save(lm, tmp_path / "m")
    with pytest.raises(ValueError, match="lm.decoder is a Foreign"):
        save(dataclasses.replace(lm, decoder=Foreign()), tmp_path / "n")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# Orbax leaves coroutines behind when a read fails; gc.collect keeps their warnings in this test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_damaged_checkpoints_are_one_clear_error(tmp_path):
    save(tiny_models.tiny_model("llama"), tmp_path / "m")
    marker = tmp_path / "m" / MARKER
    text = marker.read_text()
    marker.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(LoadError, match="format 99"):
        load(tmp_path / "m")
    wrong = json.loads(text)
    wrong["config"]["hidden_size"] = 64
    marker.write_text(json.dumps(wrong))
    with pytest.raises(LoadError, match="params: "):
        load(tmp_path / "m")
    marker.write_text(text)
    largest = max((tmp_path / "m" / "params").rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(LoadError, match="params: "):
        load(tmp_path / "m")
    gc.collect()
