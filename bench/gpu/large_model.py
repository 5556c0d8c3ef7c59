"""Llama-3.1-8B's shapes and random weights: decode, commit and prefill by wall clock.

Requests get random keys and values instead of a prompt that was read, and go through the engine
from there on, by the programs that `generate` runs.
"""

from __future__ import annotations

import functools
import gc
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.gpu.models import cache_for, greedy_request, random_model, random_tokens
from bench.gpu.report import Part
from bench.gpu.sizes import Sizes
from bench.gpu.tiers_equal import compared_pages
from bench.gpu.timed import StageTimes
from bench.timing import median
from flexijax.aot.footprint import Footprint, footprint
from flexijax.aot.targets import Target, targets
from flexijax.cache.cache import all_rows, init
from flexijax.cache.prefill_kv import empty_prefill_kv, pieces
from flexijax.cache.tiers import HostPages
from flexijax.config import CacheConfig
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import make_program
from flexijax.engine.prefiller import Prefiller, PrefillResult
from flexijax.engine.program import Program
from flexijax.models.dense import dense_attend
from flexijax.models.language_model import LanguageModel
from flexijax.pallas_kernels import platform

# Chunks that are timed program by program, after those by wall clock; and one that compiles.
_STAGED, _FIRST = 2, 1
# Of a prompt, to compare with dense attention: one page more than a product's tile.
_HEAD = 80


def decode(part: Part, sizes: Sizes) -> None:
    """A full batch, chunk by chunk; checks of its tokens and tiers, then times beside the roofline.

    Where memory is short the batch is smaller, and the record says so.
    """
    lm, cache = _model(sizes)
    engine, admitted = _filled(part, sizes, lm, cache)
    program = engine.program
    batch, steps = program.layout.sizes.batch, program.chunk_steps
    engine.step()
    layers = _some_layers(program)
    _check(part, engine, "first chunk", layers)
    before, times = _promoted(engine), []
    began = time.perf_counter()
    for chunk in range(sizes.chunks):
        started = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - started) / steps)
        part.progress("chunks of decode steps", chunk + 1, sizes.chunks)
    # What follows the steps of the last chunk goes on after they are known.
    jax.block_until_ready(engine.cache)
    mean = 1e3 * (time.perf_counter() - began) / steps / sizes.chunks
    heads = batch * program.layout.heads_of("offloaded")
    pages = (_promoted(engine) - before) / sizes.chunks / heads
    stages = StageTimes()
    engine.runner = stages
    for _ in range(_STAGED):
        engine.step()
    _check(part, engine, "last chunk", layers)
    compiled = stages.programs
    part.check("no program was compiled twice", compiled == 0, f"{compiled} compiled late")
    counted, target = _counted(sizes, cache, batch)
    part.speed(
        "decode step",
        ms=mean,
        median_ms=median(times),
        best_ms=min(times),
        roofline_ms=1e3 * counted.step.seconds,
        # What the roofline leaves out: the pages that were promoted, over the link.
        link_ms=1e3 * counted.step.page_seconds * pages,
        full_roofline_ms=1e3 * counted.full_step.seconds,
        target=target.name,
        batch=batch,
        wanted_batch=sizes.large_batch,
        context=sizes.large_context,
        promoted_pages_a_head=pages,
    )
    for stage, seconds in stages.seconds_of.items():
        what = f"{stage}, of a chunk of {steps} steps, each program waited for"
        part.speed(what, ms=1e3 * sum(seconds) / _STAGED)
    part.speed("commit of a prompt, first token included", ms=1e3 * median(admitted))


def prompt(part: Part, sizes: Sizes) -> None:
    """Reading a whole prompt in chunks, and its commit, layer by layer; by wall clock."""
    lm, cache = _model(sizes)
    length = _length(sizes, cache)
    program = make_program(
        lm,
        cache,
        max_tokens=sizes.large_context,
        batch=sizes.prompt_batch,
    )
    runner = StageTimes()
    prefiller = Prefiller(lm.decoder, lm.params, program.prefill_spec(), runner)
    tokens = random_tokens(sizes.large, length, seed=0)
    # Once to compile.
    prefiller.read(tokens, "the prompt")
    runner.seconds_of.clear()
    read = prefiller.read(tokens, "the prompt")
    part.check("hidden state is finite", bool(jnp.isfinite(read.x).all()))
    for layer, error in enumerate(_against_dense(lm, tokens, read)):
        part.near(f"first keys of layer {layer} are those of dense attention", error, 2e-2)
    blocks = np.random.default_rng(0).permutation(program.layout.sizes.pages)
    made = init(program.layout, program.policy)
    made = read.commit(runner, program, made, row=0, blocks=blocks.tolist())
    started = time.perf_counter()
    made = jax.block_until_ready(read.commit(runner, program, made, row=0, blocks=blocks.tolist()))
    commit = time.perf_counter() - started
    for layer, same in _host_is_prompt(program, made, read, blocks):
        part.check(f"the host tier of layer {layer} is the prompt", same)
    embedded, *chunks = runner.seconds_of["prefill"]
    a_layer = len(list(pieces(read.spec, length)))
    for name, took in (("first", chunks[0]), ("last", chunks[a_layer - 1])):
        part.speed(f"prefill of a layer, {name} chunk", ms=1e3 * took, context=length)
    part.speed("prefill, all layers", ms=1e3 * (embedded + sum(chunks)), context=length)
    part.speed("commit", ms=1e3 * commit, context=length)
    layers = runner.seconds_of["commit"]
    part.speed("commit, its programs", ms=1e3 * sum(layers[-len(made.pools) :]))


def _model(sizes: Sizes) -> tuple[LanguageModel, CacheConfig]:
    lm = random_model(sizes.large, name=sizes.name, dtype=sizes.dtype)
    budget = sizes.budget_pages * sizes.page
    return lm, cache_for(sizes.large, sizes.name, policy="flexi", budget_tokens=budget)


def _length(sizes: Sizes, cache: CacheConfig) -> int:
    """Tokens of a prompt, so that all chunks fit into the context; no whole pages."""
    return sizes.large_context - (sizes.chunks + _STAGED + _FIRST) * cache.chunk_steps - 3


def _filled(
    part: Part, sizes: Sizes, lm: LanguageModel, cache: CacheConfig
) -> tuple[ModelRunner, list[float]]:
    """An engine full of requests, and the seconds that admitting each took but for the first."""
    batch = sizes.large_batch
    while True:
        try:
            return _admit(part, sizes, lm, cache, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch == 1:
                raise
            batch //= 2
        # Outside of the except, which would keep all arrays of the failed attempt alive.
        gc.collect()


def _admit(
    part: Part, sizes: Sizes, lm: LanguageModel, cache: CacheConfig, batch: int
) -> tuple[ModelRunner, list[float]]:
    length, room = _length(sizes, cache), sizes.large_context
    program = make_program(
        lm,
        cache,
        max_tokens=room,
        max_new_tokens=room - length,
        batch=batch,
    )
    batch, seconds = program.layout.sizes.batch, []
    engine = ModelRunner(lm, program, progress=part.progress)
    for row in range(batch):
        made = jax.block_until_ready(_random_prompt(program, sizes, length, seed=row))
        started = time.perf_counter()
        engine.admit(greedy_request(row, [0] * length, room - length), f"request {row}", made[0])
        seconds.append(time.perf_counter() - started)
        del made
        part.progress("requests admitted", row + 1, batch)
    return engine, seconds[1:] or seconds


def _random_prompt(
    program: Program, sizes: Sizes, length: int, *, seed: int
) -> tuple[PrefillResult, Any]:
    """What reading a prompt leaves behind, of random numbers; and its arrays, to wait for."""
    spec = program.prefill_spec()
    shapes = jax.eval_shape(
        lambda: (
            tuple(empty_prefill_kv(spec) for _ in range(spec.shape.num_layers)),
            jnp.zeros((1, sizes.large.hidden_size), spec.dtype),
        )
    )
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(leaves))
    where = platform.sharding()
    made = [
        jax.device_put(_normal(key, leaf.shape, leaf.dtype), where)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    kv, x = jax.tree.unflatten(structure, made)
    return PrefillResult(program.decoder, spec, length, kv, x), made


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def _some_layers(program: Program) -> tuple[int, ...]:
    """The first, the middle and the last layer: to look at all of them takes minutes."""
    last = len(program.layout.groups) - 1
    return tuple(sorted({0, last // 2, last}))


def _check(part: Part, engine: ModelRunner, what: str, layers: tuple[int, ...]) -> None:
    """Of a batch after a chunk: its lengths, tokens that are in the vocabulary, equal tiers."""
    assert engine.cache is not None
    lengths = np.asarray(all_rows(engine.cache).lengths).tolist()
    held = [sequence.held for sequence in engine.running.values()]
    part.check(f"{what}: lengths", lengths == held, lengths[:2])
    tokens = [token for sequence in engine.running.values() for token in sequence.tokens]
    inside = all(0 <= token < engine.lm.vocab_size for token in tokens)
    part.check(f"{what}: tokens are of the vocabulary", inside and len(set(tokens)) > 1)
    compared, unequal = compared_pages(engine.program.layout, engine.cache, layers)
    found = f"{unequal} of {compared} pages differ"
    part.check(f"{what}: tiers of layers {layers}", compared > 0 and not unequal, found)


def _promoted(engine: ModelRunner) -> int:
    return sum(engine.stats(sequence).promoted_pages for sequence in engine.running.values())


def _counted(sizes: Sizes, cache: CacheConfig, batch: int) -> tuple[Footprint, Target]:
    """What the compile report says of the same sizes on this GPU, or on the first that it knows."""
    known, kind = targets(), jax.devices()[0].device_kind
    target = next((t for t in known.values() if t.description == kind), known["h100"])
    counted, _ = footprint(
        sizes.large,
        name=sizes.name,
        cache=cache,
        context=sizes.large_context,
        batch=batch,
        target=target,
    )
    return counted, target


def _against_dense(lm: LanguageModel, tokens: list[int], read: PrefillResult) -> list[float]:
    """Errors of the first two layers' keys against those of dense attention on the first tokens."""
    attend = dense_attend(lm.attention)
    piece = jnp.asarray([tokens[:_HEAD]], jnp.int32)

    def recording(layer: int, q: Any, k: Any, v: Any, state: Any) -> Any:
        return attend(layer, q, k, v, None)[0], (*state, k[0])

    @jax.jit
    def keys(params: Any, piece: jax.Array) -> Any:
        positions = jnp.arange(piece.shape[1], dtype=jnp.int32)[None]
        return lm.decoder.hidden(params, piece, positions, recording, ())[1][:2]

    errors = []
    for layer, wanted in enumerate(keys(lm.params, piece)):
        found = np.asarray(read.kv[layer].k[:, :, : piece.shape[1]], np.float64)  # [K, H, T]
        wanted = np.asarray(wanted, np.float64)  # [T, K, H]
        error = np.linalg.norm(found.transpose(2, 0, 1) - wanted, axis=-1)
        errors.append(float((error / np.linalg.norm(wanted, axis=-1)).max()))
    return errors


def _host_is_prompt(
    program: Program, cache: Any, read: PrefillResult, blocks: np.ndarray
) -> list[tuple[int, bool]]:
    """(layer, whether its full pages on the host are the prompt's), of some layers."""
    sizes, found = program.layout.sizes, []
    full = read.length // sizes.page_size
    for layer, at, group in program.layout.all_groups():
        host = cache.pools[layer].host[at]
        if not isinstance(host, HostPages) or layer not in _some_layers(program):
            continue
        k = np.asarray(read.kv[layer].k)[list(group.heads)]
        k = k.reshape(*k.shape[:2], sizes.pages, sizes.page_size).transpose(2, 0, 3, 1)
        v = np.asarray(read.kv[layer].v)[list(group.heads)]
        v = v.reshape(len(v), sizes.pages, sizes.page_size, -1).swapaxes(0, 1)
        same = all(
            np.array_equal(
                np.asarray(pool)[blocks[:full]].view(np.uint16),
                np.ascontiguousarray(truth[:full]).view(np.uint16),
            )
            for pool, truth in ((host.k, k), (host.v, v))
        )
        found.append((layer, same))
    return found
