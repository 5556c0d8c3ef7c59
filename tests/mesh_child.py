"""What `test_mesh` starts as a process of its own: several simulated devices, tokens and programs.

Its argument is a list of cases in JSON, {"policy", "devices", "engine", "watched", "real"}; it
prints them with what it found. Beside that, in each of two processes, the address of the first and
a number.
"""

import collections
import dataclasses
import functools
import json
import math
import re
import sys
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import flexijax
from flexijax.cache.over_mesh import on_shards
from flexijax.cache.selected import SelectedGroup
from flexijax.engine import model_runner
from flexijax.engine.jit_cache import jitted
from flexijax.engine.program import Runner
from flexijax.models.decoder import Decoder
from flexijax.models.dense import dense_attend
from flexijax.models.shards import shard_decoder, shard_params
from flexijax.pallas_kernels import placing, platform
from flexijax.policies.flexi import Flexi
from flexijax.policies.sketch import Sketch
from tests.tiny_models import tiny_model

PAGE, STEPS, NEW = 4, 8, 20
LAYERS, HEADS = 3, 8
# Of each layer 4 devices cannot have equally many, nor can 2 but of the last; of all of them both
# can.
UNSTABLE = ((1,), (5,), (2, 7))
COLLECTIVE = re.compile(
    r" = (\S+) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|"
    r"collective-broadcast)(?:-start)?\("
)


def model(**changes):
    return tiny_model(
        **{"num_layers": LAYERS, "num_kv_heads": HEADS, "num_heads": 2 * HEADS, **changes}
    )


def cache(policy):
    interval = "adaptive" if policy == "adaptive" else STEPS
    if policy in ("flexi", "adaptive"):
        policy = Flexi(score=Sketch(fit_tokens=32))  # prompts share what is no shorter
    profile = flexijax.HeadProfile(
        model="tiny-llama",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        unstable=tuple((layer, head) for layer, heads in enumerate(UNSTABLE) for head in heads),
        page_size=PAGE,
        budget_pages=4,
        source="by hand",
    )
    return flexijax.CacheConfig(
        policy=policy,
        page_size=PAGE,
        budget_tokens=4 * PAGE,
        rerank_interval=interval,
        profile=profile,
    )


def prompt_of(length):
    return np.random.default_rng(length).integers(0, 97, length).tolist()


def mesh_of(count):
    return None if count == 1 else Mesh(np.array(jax.devices()[:count]), ("heads",))


class Watched(Runner):
    """Notes of every program which collectives it has, and what it updates in place."""

    found: ClassVar[list] = []
    seen: ClassVar[set] = set()

    def run(self, stage, function, static, args, donate=()):
        if (function, static) in self.seen:
            return super().run(stage, function, static, args, donate)
        self.seen.add((function, static))
        # For the very arguments of the call, which then compiles nothing.
        compiled = jitted(function, static, donate, self.mesh).lower(*args).compile()
        memory = compiled.memory_analysis()
        self.found.append(
            {
                "program": function.__name__,
                "collectives": COLLECTIVE.findall(compiled.as_text()),
                "aliased": memory.alias_size_in_bytes + memory.host_alias_size_in_bytes,
                "donated": bytes_of_one([args[at] for at in donate]),
            }
        )
        return super().run(stage, function, static, args, donate)


def bytes_of_one(tree):
    """On one device."""
    leaves = jax.tree.leaves(tree)
    shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def unstable_bytes(made):
    """Of each device, the bytes of the pages of unstable heads."""
    found = collections.Counter()
    layers = [*made.pools, *([] if made.shared is None else [made.shared])]
    for group in (group for layer in layers for group in layer.groups):
        if isinstance(group, SelectedGroup) and group.k is not None:
            for shard in (*group.k.addressable_shards, *group.v.addressable_shards):
                found[shard.device.id] += shard.data.nbytes
    return [found[device] for device in sorted(found)]


def answer_of(made):
    """All that does not depend on time."""
    fields = dataclasses.asdict(made.metrics)
    timed = [name for name in fields if name.endswith("_s") or name.endswith("_ms")]
    kept = {name: value for name, value in fields.items() if name not in timed}
    return {"tokens": made.token_ids, "metrics": kept}


def of_generate(lm, policy, mesh):
    made = flexijax.generate(
        lm, [prompt_of(24), prompt_of(16)], max_new_tokens=NEW, cache=cache(policy), mesh=mesh
    )
    return {"answers": [answer_of(of) for of in made]}


def of_engine(lm, policy, mesh):
    """Three requests on two rows; two prompts begin alike, and one is so short that it is refitted.

    Everything is compiled before, so that what `all_calls` lists is what runs.
    """
    engine = flexijax.Engine(
        lm, cache=cache(policy), max_requests=2, max_context=128, prefill_first=True, mesh=mesh
    )
    engine.compile()
    compiled = engine._core.runner.runner.programs
    prompts = [prompt_of(70), prompt_of(5), [*prompt_of(70)[:64], *prompt_of(9)]]
    streams = [engine.submit(prompt, max_new_tokens=NEW) for prompt in prompts]
    answers = [answer_of(stream.result()) for stream in streams]
    again = engine._core.runner.runner.programs - compiled
    held = unstable_bytes(engine._core.runner.cache)
    return {"answers": answers, "unstable_bytes": held, "compiled_again": again}


def of_smollm2(lm, policy, mesh):
    """A real model: of 3 KV heads a layer none, one or all are unstable, by its profile."""
    lm = flexijax.load("smollm2")
    prompt = " ".join(f"Note {at}: room {at * 7 % 13} has key {at * 31 % 97}." for at in range(24))
    small = flexijax.CacheConfig(policy=policy, budget_tokens=64)
    [made] = flexijax.generate(lm, [prompt], max_new_tokens=32, cache=small, mesh=mesh)
    return {"answers": [answer_of(made)]}


def of_models(lm, policy, mesh):
    """Of a tiny model of each kind, how far logits of whole texts are from those of one device."""
    heads, errors = [[(1,), (0,)], [(0,), (1,)]], {}
    for name in ("llama", "llama-tied", "qwen2", "qwen3"):
        lm = tiny_model(name, intermediate_size=81)
        assert isinstance(lm.decoder, Decoder)
        config, local = lm.decoder.config, shard_decoder(lm.decoder, 2, "heads")
        with placing.over(mesh):
            params = shard_params(config, lm.params, heads)
        alone = jax.jit(functools.partial(dense_logits, lm.decoder))(lm.params)
        of_part = functools.partial(dense_logits, local)
        several = jax.jit(lambda params, of=of_part: on_shards(of, mesh, (params,)))(params)
        errors[name] = [float(abs(alone - several).max()), float(abs(alone).max())]
    return {"errors": errors}


def dense_logits(decoder, params):
    tokens = jnp.asarray([prompt_of(20)])
    positions = jnp.arange(20)[None]
    attention_fn = dense_attend(decoder.config.attention_shape)
    return decoder.logits(params, decoder.hidden(params, tokens, positions, attention_fn, None)[0])


def main(cases):
    platform._PREFILL_SIZES = {"cpu": (32, 8, 3, 1), "gpu": (32, 8, 3, 4)}
    lm, found = model(), []
    for case in cases:
        Watched.found, Watched.seen = [], set()
        model_runner.Runner = Watched if case.get("watched") else Runner
        run = of_engine if case.get("engine") else of_generate
        run = of_smollm2 if case.get("real") else run
        run = of_models if case["policy"] == "dense" else run
        made = run(lm, case["policy"], mesh_of(case["devices"]))
        found.append({**case, **made, "programs": Watched.found})
    print(json.dumps(found))


if __name__ == "__main__":
    if len(sys.argv) > 2:  # one of two processes of a mesh
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
    main(json.loads(sys.argv[1]))
