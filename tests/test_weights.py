"""Loading Hugging Face directories: one error that lists every problem, nothing half loaded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax.models import huggingface, placement
from flexijax.models.errors import LoadError
from flexijax.models.load import load, resolve
from tests import tiny_models
from tests.model_files import tensors, write_hf
from tests.test_tokenizer import BYTES, byte_tokenizer

pytestmark = pytest.mark.any_jax


def test_every_problem_of_a_checkpoint_is_listed_at_once(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    del named["model.norm.weight"], named["model.layers.1.mlp.up_proj.weight"]
    named["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 4), np.float32)
    named["model.layers.7.mlp.up_proj.weight"] = np.zeros((80, 48), np.float32)
    named["visual.patch.weight"] = np.zeros((2, 2), np.float32)
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert set(caught.value.problems) == {
        "missing tensor: final_norm",
        "missing tensor: up of layer 1",
        "model.layers.0.self_attn.q_proj.weight: shape (3, 4), the config says (48, 48)",
        "model.layers.7.mlp.up_proj.weight: the config has no place for it",
        "visual.patch.weight: not a tensor of this model family",
    }


def test_values_that_are_not_finite_are_listed(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    named["lm_head.weight"][3, 4] = np.nan
    named["model.norm.weight"][0] = np.inf
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 2
    assert all("not finite" in problem for problem in caught.value.problems)


def test_a_tied_model_may_carry_its_head(tmp_path):
    config = tiny_models.tiny_config("llama-tied")
    named = tensors(config)
    named["lm_head.weight"] = named["model.embed_tokens.weight"]
    write_hf(tmp_path / "m", config, named)
    assert "lm_head" not in load(tmp_path / "m").params


def test_a_head_of_no_axes_beside_the_tied_flag_is_a_problem_and_no_crash(tmp_path):
    config = tiny_models.tiny_config("llama-tied")
    named = tensors(config)
    named["lm_head.weight"] = named["model.embed_tokens.weight"] = np.zeros((), np.float32)
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError, match="lm_head.weight: shape .., the config says .97, 48."):
        load(tmp_path / "m")


def test_damaged_directories_are_one_clear_error(tmp_path):
    config = tiny_models.tiny_config("llama")
    write_hf(tmp_path / "m", config, tensors(config))
    path = tmp_path / "m" / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 5, 200):
        path.write_bytes(whole[:length])
        with pytest.raises(LoadError, match="truncated or not a safetensors file"):
            load(tmp_path / "m")
    path.write_bytes(whole[:-5000])
    with pytest.raises(LoadError, match="model.safetensors ends .* bytes too early"):
        load(tmp_path / "m")
    path.unlink()
    with pytest.raises(LoadError, match="no model.safetensors and no"):
        load(tmp_path / "m")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadError, match="model-1.safetensors: named in") as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 2
    (tmp_path / "m" / "config.json").write_text("{")
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert len(caught.value.problems) == 4  # both of these, and both files of the index


def test_a_tokenizer_of_a_larger_model_is_listed_beside_what_else_is_wrong(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    del named["model.norm.weight"]
    write_hf(tmp_path / "m", config, named)
    byte_tokenizer().save(tmp_path / "m")
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert set(caught.value.problems) == {
        "missing tensor: final_norm",
        f"tokenizer: {len(BYTES) + 4} tokens, the config says 97",
    }


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"chat_template": [{"name": "default"}]}', r"chat_template\[0\]=.*must have a name and"),
        ('{"bos_token": 5}', "bos_token=5: must be a text or"),
        (
            '{"bos_token": ["<s>"], "add_bos_token": true}',
            r"bos_token=\['<s>'\]: must be a text or",
        ),
    ],
)
def test_a_tokenizer_config_of_the_wrong_kind_is_a_problem_and_no_crash(content, says, tmp_path):
    config = tiny_models.tiny_config("llama", vocab_size=len(BYTES) + 4)
    write_hf(tmp_path / "m", config, tensors(config))
    byte_tokenizer().save(tmp_path / "m")
    assert load(tmp_path / "m").tokenizer is not None
    (tmp_path / "m" / "tokenizer_config.json").write_text(content)
    with pytest.raises(LoadError, match=f"tokenizer: .*tokenizer_config.json: {says}"):
        load(tmp_path / "m")


def test_integer_tensors_are_refused(tmp_path):
    config = tiny_models.tiny_config("llama")
    named = tensors(config) | {"lm_head.weight": np.zeros((97, 48), np.int32)}
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError, match="'lm_head.weight': dtype 'I32'"):
        load(tmp_path / "m")


def test_names_that_lead_nowhere_say_what_was_tried(tmp_path):
    with pytest.raises(LoadError) as caught:
        resolve("nobody/nothing-at-all")
    message = str(caught.value)
    assert "does not exist" in message and "hub id 'nobody/nothing-at-all'" in message
    assert "hf download nobody/nothing-at-all" in message and "smollm2" in message
    with pytest.raises(LoadError, match="not of the form owner/name"):
        resolve("smol lm")
    for name in ("", None, 5):
        with pytest.raises(LoadError, match="no name of a model"):
            resolve(name)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(LoadError, match="not a .gguf"):
        resolve(tmp_path / "x.bin")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="dtype='int4': must be one of float32"):
        load("smollm2", dtype="int4")


@pytest.mark.parametrize("tokens", [True, 1.5, "64"])
def test_a_context_that_is_no_number_is_refused(tokens):
    with pytest.raises(ValueError, match=f"max_context={tokens!r}: must be None or a number"):
        load("smollm2", max_context=tokens)


def test_dtype_and_sharding_are_applied(tmp_path):
    config = tiny_models.tiny_config("qwen3")
    write_hf(tmp_path / "m", config, tensors(config))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lm = load(tmp_path / "m", dtype="bfloat16", sharding=sharding, max_context=64)
    assert lm.max_context == 64 and lm.dtype == jnp.bfloat16
    for leaf in jax.tree.leaves(lm.params):
        assert leaf.dtype == jnp.bfloat16 and leaf.sharding == sharding


@pytest.mark.parametrize(
    ("dtype", "largest", "stored", "wide"),
    [
        ("float16", -70000.0, np.float32, "'float32' or 'bfloat16'"),
        ("bfloat16", 3.4e38, np.float32, "'float32'"),
        ("float32", 1e300, np.float64, None),
    ],
)
def test_values_that_overflow_the_dtype_are_refused(dtype, largest, stored, wide, tmp_path):
    """In silence they would be infinite, and every logit no number."""
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    name = "model.layers.1.mlp.up_proj.weight"
    named[name] = named[name].astype(stored)
    named[name][79, 3] = largest
    write_hf(tmp_path / "m", config, named)
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m", dtype=dtype)
    advice = f"load with dtype={wide}" if wide else "no dtype holds it"
    assert caught.value.problems == (
        f"{name}: its largest value, {abs(largest):.6g}, is infinite in {dtype}: {advice}",
    )
    if wide:
        loaded = load(tmp_path / "m", dtype="float32").params["layers"][1]["gate_up"]["kernel"]
        assert float(loaded[80 + 79, 3]) == np.float32(largest)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    config = tiny_models.tiny_config("llama")
    named = tensors(config)
    write_hf(tmp_path / "m", config, named)
    total = sum(array.nbytes for array in named.values())
    largest = 2 * 80 * 48 * 4  # gate and up are one kernel
    monkeypatch.setattr(placement, "available_host_bytes", lambda: total + largest)
    load(tmp_path / "m")
    monkeypatch.setattr(placement, "available_host_bytes", lambda: total + largest - 1)
    monkeypatch.setattr(huggingface.Safetensors, "rows", lambda *_: pytest.fail("it was read"))
    with pytest.raises(LoadError) as caught:
        load(tmp_path / "m")
    assert caught.value.problems == (
        f"host memory: the weights take {total:,} bytes in float32, and the largest {largest:,} "
        f"once more while it is read; {total + largest - 1:,} bytes are available",
    )
    monkeypatch.undo()
    monkeypatch.setattr(placement, "available_host_bytes", lambda: total)
    assert load(tmp_path / "m", dtype="bfloat16").dtype == jnp.bfloat16


def test_an_error_is_short_however_long_the_names_are():
    error = LoadError("x" * 10**6, [f"{n}: {'y' * 10**5}" for n in range(50)])
    assert len(str(error)) < 42 * 510 and all(len(p) <= 500 for p in error.problems)
    assert "... and 10 more" in str(error)
