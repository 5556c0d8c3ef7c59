"""Whole programs of every family, two layers deep, compiled for GPUs that are not here."""

import dataclasses

import pytest

from flexijax.aot import compile as aot
from flexijax.aot.compile_report import compile_report
from flexijax.aot.footprint import shipped_profile
from flexijax.aot.targets import target
from flexijax.config import CacheConfig
from flexijax.models import presets
from flexijax.profiles.head_profile import HeadProfile

try:
    aot.prepare()  # while tests are collected, before any of them touches a device
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
FAMILIES = ("llama-3.1-8b", "mistral-7b-v0.2", "mistral-small-24b", "qwen2.5-32b", "qwen3-8b")


def two_layers(preset, *, gpu="h100", context=4096, **options):
    """A layer with three unstable heads and one with one, so that no two kernels are the same."""
    config = dataclasses.replace(presets.config(preset), num_layers=2)
    profile = HeadProfile(
        model=preset,
        num_layers=2,
        num_kv_heads=config.num_kv_heads,
        unstable=((0, 1), (0, 4), (0, 5), (1, 7)),
        page_size=16,
        budget_pages=64,
        source="by hand",
    )
    return compile_report(
        config,
        name=preset,
        cache=CacheConfig(**options),
        profile=profile,
        context=context,
        batch=16,
        target=target(gpu),
    )


def check(report):
    decode = report.decode
    assert decode.pool_copies == 0
    assert decode.unaliased == () and report.prefill.unaliased == ()
    for program in (decode, report.prefill):
        assert program.host_callbacks == 0 and program.collectives == 0
        assert program.host.temporaries == 0
    # What was counted from the layout is what the compiler was given, rows of the batch aside.
    sizes, rows = report.counted.sizes, 8192
    counted = sizes.weights + sizes.kv_pages + sizes.slots + sizes.summaries + sizes.tables
    assert counted <= decode.device.arguments <= counted + rows
    assert decode.host.arguments == sizes.host_pages
    attending = [k for k in decode.kernels if "_decode_" in k.name]
    assert attending
    for kernel in decode.kernels:
        assert kernel.spill_bytes == 0
    for kernel in attending:
        assert kernel.registers <= 128
        if kernel.instructions:
            assert kernel.tensor_core_instructions > 0 and kernel.wide_loads > 0
    return {kernel.name.rstrip("_0123456789") for kernel in decode.kernels}


@pytest.mark.parametrize(
    "preset, gpu",
    [*((preset, "h100") for preset in FAMILIES), ("llama-3.1-8b", "a100"), ("qwen3-8b", "a100")],
)
def test_every_family_compiles(preset, gpu):
    names = check(two_layers(preset, gpu=gpu))
    assert names >= {
        "flexijax_decode_pages",
        "flexijax_decode_slots",
        "flexijax_sketch_scores",
        "flexijax_promote",
        "flexijax_offload",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "full"},
        {"mode": "quest"},
        {"score": "minmax", "summary_dtype": "int8"},
        {"rerank_interval": "adaptive"},
    ],
    ids=str,
)
def test_every_policy_compiles(options):
    names = check(two_layers("llama-3.1-8b", **options))
    moves = {"flexijax_promote", "flexijax_offload"}
    assert names >= moves if options.get("mode") is None else not names & moves


def test_zero_copy_stages_nothing():
    """Host pages reach the kernels as they are; what is staged shows in the same count."""
    zero_copy = two_layers("llama-3.1-8b").decode
    assert zero_copy.staging_copies == 0
    staged = two_layers("llama-3.1-8b", transfer="staged").decode
    assert staged.staging_copies > 0


def test_equal_layers_are_assembled_once():
    config = presets.config("llama-3.1-8b")
    profile = shipped_profile("llama-3.1-8b", 64)
    assert profile is not None
    pairs = tuple((layer, head) for layer in range(4) for head in (1, 2))
    report = compile_report(
        dataclasses.replace(config, num_layers=4),
        name="four equal layers",
        cache=CacheConfig(),
        profile=dataclasses.replace(profile, num_layers=4, unstable=pairs, rco=None),
        context=4096,
        batch=4,
        target=target("h100"),
    )
    kinds = [kernel.name.rstrip("_0123456789") for kernel in report.decode.kernels]
    # One of the unstable heads and, at a rerank, one of the stable ones.
    assert kinds.count("flexijax_sketch_scores") <= 2
    stages = []
    compile_report(
        dataclasses.replace(config, num_layers=1),
        name="one layer",
        cache=CacheConfig(mode="full"),
        profile=None,
        context=1024,
        batch=1,
        target=target("h100"),
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    for stage in ("tracing", "compiling", "assembling kernels of"):
        assert any(seen.startswith(f"{stage} the decode chunk") for seen, *_ in stages)
    assert all(done <= total for _, done, total in stages)
