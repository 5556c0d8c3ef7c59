"""What a program for a GPU costs: counted from the layout, and compiled where the extra is."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from flexijax.aot.compile_report import compile_report
from flexijax.aot.footprint import (
    assumed_profile,
    make_program,
    shipped_profile,
    step_bytes,
)
from flexijax.aot.targets import target
from flexijax.cache.cache import abstract, all_rows
from flexijax.cache.memory import nbytes
from flexijax.cli import compile_report as cli_compile_report
from flexijax.cli import main as cli
from flexijax.config import CacheConfig
from flexijax.models import presets
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from flexijax.policies.sketch import Sketch

LLAMA = presets.config("llama-3.1-8b")


def program(policy, *, config=LLAMA):
    cache = CacheConfig(policy=policy, profile=shipped_profile("llama-3.1-8b", 64))
    return make_program(config, cache, context=32768, batch=16)


@pytest.mark.parametrize("preset", presets.NAMES)
def test_every_preset_has_a_profile_that_fits(preset):
    config, cache = presets.config(preset), CacheConfig()
    profile = shipped_profile(preset, 64)
    assert (profile is None) == (preset == "qwen3-8b")
    profile = profile or assumed_profile(config, cache)
    profile.check(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads)
    heads = config.num_layers * config.num_kv_heads
    assert len(profile.unstable) == pytest.approx(heads / 4, abs=1)


def test_an_assumed_profile_spreads_evenly():
    profile = assumed_profile(dataclasses.replace(LLAMA, num_layers=4), CacheConfig())
    assert {len(profile.unstable_heads(layer)) for layer in range(4)} == {2}


def test_bytes_of_a_step_by_hand():
    page, bound, rows = 8192, 512, 16  # bytes of a page, of its summary, and requests
    full = step_bytes(program("full"))
    assert dataclasses.astuple(full) == (0, rows * 256 * 2048 * page, rows * 256 * 2048 * 16, 0)
    quest = step_bytes(program("quest"))
    read = rows * 256 * 64
    assert dataclasses.astuple(quest) == (read * page, 0, read * 16, rows * 256 * 2048 * bound)
    flexi = step_bytes(program("flexi"))
    assert flexi.pages == rows * 64 * 64 * page
    assert flexi.slots == rows * 192 * 65 * page
    assert flexi.tokens == rows * (64 * 64 + 192 * 65) * 16
    assert flexi.scoring == rows * (64 + 192 / 16) * 2048 * bound
    assert flexi.total <= full.total / 16


@pytest.mark.parametrize(
    ("score", "least", "most"),
    [(Sketch(2), 0.33, 0.345), (MinMax("bfloat16"), 0.33, 0.345), (MinMax("int8"), 0.30, 0.31)],
    ids=["sketch", "16", "8"],
)
def test_the_cache_lies_where_it_should(score, least, most):
    found = program(Flexi(score))
    cache, sizes = all_rows(abstract(found.layout, found.policy)), found.layout.sizes
    host = [layer.host for layer in cache.layers]
    groups = [layer.groups for layer in cache.layers]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(host)} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(groups)} == {"device"}
    full = 256 * sizes.blocks * sizes.page_bytes
    held = [leaf for leaf in jax.tree.leaves(groups) if leaf.dtype != jnp.int32]
    assert least < nbytes(held) / full <= most


def test_a_bad_size_is_refused_before_compiling():
    for wrong in ({"context": 0}, {"batch": True}, {"context": 10**7}):
        sizes = {"context": 4096, "batch": 1, **wrong}
        with pytest.raises(ValueError, match=next(iter(wrong))):
            compile_report(
                LLAMA,
                name="llama",
                cache=CacheConfig(policy="quest"),
                target=target("h100"),
                **sizes,
            )


def test_memory_that_cannot_be_is_refused(capsys):
    assert cli.main(["compile-report", "--model", "llama-3.1-8b", "--memory", "80", "-1"]) == 2
    assert "--memory" in capsys.readouterr().err


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    def missing():
        raise RuntimeError("needs pip install 'flexijax[aot]'")

    monkeypatch.setattr(cli_compile_report.aot, "prepare", missing)
    assert cli.main(["compile-report", "--model", "llama-3.1-8b"]) == 2
    assert "flexijax[aot]" in capsys.readouterr().err
