"""Whole programs of every family, a layer or two deep, compiled for GPUs that are not here."""

import dataclasses
import functools

import pytest

from flexijax.aot import compile as aot
from flexijax.aot.compile_report import compile_report
from flexijax.aot.footprint import abstract_params, make_program, shipped_profile
from flexijax.aot.targets import target
from flexijax.config import CacheConfig
from flexijax.engine.inventory import decode_calls
from flexijax.engine.program import BOUNDARY_STEPS
from flexijax.models import presets
from flexijax.pallas_kernels.platform import JAX_VERSION
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from flexijax.profiles.head_profile import HeadProfile

try:
    aot.prepare()  # while tests are collected, before any of them touches a device
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
FAMILIES = ("llama-3.1-8b", "mistral-7b-v0.2", "mistral-small-24b", "qwen2.5-32b", "qwen3-8b")


def model(preset, layers):
    """A layer with three unstable heads, and one with one, so that no two kernels are the same."""
    config = dataclasses.replace(presets.config(preset), num_layers=layers)
    unstable = ((0, 1), (0, 4), (0, 5), (1, 7))
    profile = HeadProfile(
        model=preset,
        num_layers=layers,
        num_kv_heads=config.num_kv_heads,
        unstable=tuple(pair for pair in unstable if pair[0] < layers),
        page_size=16,
        budget_pages=64,
        source="by hand",
    )
    return config, profile


# Twice the budget: chunks of a prompt attend to one of two lengths of keys.
CONTEXT = 2048


@functools.cache
def compiled(preset, *, layers=1, gpu="h100", transfer=None, **options):
    """What the report says of `model`."""
    config, profile = model(preset, layers)
    return compile_report(
        config,
        name=preset,
        cache=CacheConfig(profile=profile, transfer=transfer, **options),
        context=CONTEXT,
        batch=16,
        target=target(gpu),
        device_bytes=(),
    )


STAGES = {"prefill", "commit", "first token", "decode"}
# Launches of two layers, as many as when this was written; fewer is better.
MOST = {
    "prefill": 447,  # of 9 pieces of a prompt
    "prefill outside graphs": 46,  # cuDNN, twice a piece and layer
    "commit": 108,
    "prefix": 18,
    "decode": 39 if JAX_VERSION < (0, 12) else 40,  # the newest XLA fuses one thing less
    "decode outside graphs": 0,
    "end of a chunk": 18,
    "refit": 56,
}


def check(report):
    """Law 7 of every program that `generate` runs; the names of its kernels."""
    assert set(report.stages) >= STAGES
    for name, stage in report.stages.items():
        assert stage.unaliased == ()
        assert stage.host_callbacks == 0 and stage.collectives == 0
        assert stage.host.temporaries == 0 and stage.staging_copies == 0
        # Shared pages are read, and nothing on the host is written.
        assert stage.host.aliased == (0 if name == "prefix" else stage.host.arguments)
        # A commit turns one prompt's keys and values into pages; nothing else copies as much.
        # What was shared comes out of its pages the same way.
        assert stage.pool_copies == 0 or name in ("commit", "prefix")
        # Nothing waits for the host, and each loop is one that the compiler can count.
        total = stage.launches.total
        assert total.conditionals == total.unknown_loops == total.host_syncs == 0
    # A chunk of decode steps is one loop, with none inside.
    [loop] = report.stages["decode"].launches.loops
    observing = report.cache.policy == "h2o"
    assert loop.trips == (16 if observing else BOUNDARY_STEPS) and loop.each.loops == 0
    # What was counted from the layout is what the compiler was given, the batch's state aside.
    sizes, rows, decode = report.counted.sizes, 8192, report.stages["decode"]
    # Of summaries steps are given those of heads whose pages are chosen at every step.
    profile, chosen = report.cache.profile, 1.0
    if report.cache.policy != "quest":
        chosen = len(profile.unstable) / (profile.num_layers * profile.num_kv_heads)
    counted = sizes.weights + sizes.kv_pages + sizes.slots + round(chosen * sizes.summaries)
    assert counted <= decode.device.arguments <= counted + sizes.tables + rows
    attending = [kernel for kernel in decode.kernels if "_decode_" in kernel.name]
    assert attending
    kernels = [kernel for stage in report.stages.values() for kernel in stage.kernels]
    for kernel in kernels:
        assert kernel.spill_bytes == 0
    for kernel in attending:
        assert kernel.registers <= 128
        if kernel.instructions:
            assert kernel.tensor_core_instructions > 0 and kernel.wide_loads > 0
    return {kernel.name.rstrip("_0123456789") for kernel in kernels}


@pytest.mark.parametrize(
    "preset, gpu",
    [*((preset, "h100") for preset in FAMILIES), ("llama-3.1-8b", "a100"), ("qwen3-8b", "a100")],
)
def test_every_family_compiles(preset, gpu):
    names = check(compiled(preset, gpu=gpu))
    assert names >= {
        "flexijax_add_norm",
        "flexijax_decode_attention",
        "flexijax_sketch_query",
        "flexijax_sketch_scores",
        "flexijax_select_pages",
        "flexijax_sketch_encode",
        "flexijax_rerank_plan",
        "flexijax_promote",
        "flexijax_offload",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "full"},
        {"policy": "quest"},
        {"policy": "streaming_llm"},
        {"policy": "snapkv"},
        {"policy": "h2o"},
        {"policy": Flexi(MinMax("int8"))},
        {"rerank_interval": "adaptive"},
    ],
    ids=str,
)
def test_every_policy_compiles(options):
    names = check(compiled("llama-3.1-8b", **options))
    moves = {"flexijax_promote", "flexijax_offload"}
    assert names >= moves if not isinstance(options.get("policy"), str) else not names & moves


def test_a_step_is_one_graph_of_few_launches():
    """The decode program alone, which CI compiles on the newest jax as well."""
    config, profile = model("llama-3.1-8b", 2)
    cache = CacheConfig(profile=profile)
    program = make_program(config, cache, context=CONTEXT, batch=16)
    [call] = [c for c in decode_calls(program, abstract_params(config)) if c.stage == "decode"]
    report = aot.compile_for(
        call.jitted, call.args, target=target("h100"), kernels_named="flexijax_"
    )
    [loop] = report.launches.loops
    assert loop.trips == BOUNDARY_STEPS and loop.each.launches <= MOST["decode"]
    assert (loop.each.outside, loop.each.graphs, loop.each.loops) == (0, 1, 0)
    assert (loop.each.conditionals, loop.each.host_syncs) == (0, 0)
    assert report.host_callbacks == report.staging_copies == report.copies(at_least=1 << 24) == 0
    assert {kernel.spill_bytes for kernel in report.kernels} == {0}
    attending = [kernel.registers for kernel in report.kernels if "attention" in kernel.name]
    assert 0 < max(attending) <= 128


def test_launches_stay_few():
    """Upper bounds for two layers of different heads: what comes back shows in a report as well."""
    report = compiled("llama-3.1-8b", layers=2)
    check(report)
    assert set(report.stages) == {*STAGES, "prefix", "end of a chunk", "refit"}
    counts = {name: stage.launches.total for name, stage in report.stages.items()}
    step = report.stages["decode"].launches.step
    assert step.launches <= MOST["decode"] and step.outside <= MOST["decode outside graphs"]
    for name in ("prefill", "commit", "prefix", "end of a chunk", "refit"):
        assert counts[name].launches <= MOST[name], name
        assert counts[name].outside <= MOST.get(f"{name} outside graphs", 0)


def test_the_estimate_of_a_step_is_no_less_than_its_roofline():
    report = compiled("llama-3.1-8b", layers=2)
    assert report.counted.step.seconds < report.step.seconds
    for kernel in report.stages["decode"].kernels:
        assert kernel.issued >= sum(kernel.instructions.values()) // 2
        # The loop that looks for the least chosen rank: LLVM has shaped it anew for few pages.
        assert kernel.issued_exact or "select_pages" in kernel.name


def test_zero_copy_stages_nothing():
    """Host pages reach the kernels as they are; what is staged shows in the same count."""
    zero_copy = compiled("llama-3.1-8b").stages
    assert all(stage.staging_copies == 0 for stage in zero_copy.values())
    staged = compiled("llama-3.1-8b", transfer="staged").stages
    assert staged["commit"].staging_copies > 0 and staged["end of a chunk"].staging_copies > 0


def test_equal_layers_are_assembled_once():
    config = presets.config("llama-3.1-8b")
    profile = shipped_profile("llama-3.1-8b", 64)
    assert profile is not None
    pairs = tuple((layer, head) for layer in range(4) for head in (1, 2))
    stages = []
    report = compile_report(
        dataclasses.replace(config, num_layers=4),
        name="four equal layers",
        cache=CacheConfig(
            profile=dataclasses.replace(profile, num_layers=4, unstable=pairs, rco=None)
        ),
        context=4096,
        batch=4,
        target=target("h100"),
        device_bytes=(),
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    kernels = [kernel for stage in report.stages.values() for kernel in stage.kernels]
    kinds = [kernel.name.rstrip("_0123456789") for kernel in kernels]
    # One of the unstable heads, and of the stable ones one at a rerank and one after a prompt.
    assert kinds.count("flexijax_sketch_scores") <= 3
    assert (report.stages["commit"].programs, report.stages["commit"].calls) == (1, 4)
    for stage in ("tracing", "compiling", "assembling kernels of"):
        assert any(seen.startswith(f"{stage} the program: decode") for seen, *_ in stages)
    assert all(done <= total for _, done, total in stages)
