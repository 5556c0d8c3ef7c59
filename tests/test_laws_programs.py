"""Law 7: no program that runs copies a pool, calls anybody, or leaves a donated array behind.

What is looked at is what `generate` runs: every call of the runner is written down, with what the
same object of `engine.program.jitted` was compiled to for it.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

import flexijax
from flexijax.cache.cache import all_rows
from flexijax.cache.memory import nbytes
from flexijax.engine import model_runner
from flexijax.engine.jit_cache import jitted
from flexijax.engine.model_runner import ModelRunner
from flexijax.engine.plan import make_program
from flexijax.engine.program import Runner
from tests.dropping import DROPPING
from tests.tiny_models import tiny_model
from tests.tiny_runs import ADAPTIVE, SMALL, prompt_of, request_of

pytestmark = pytest.mark.usefixtures("short_chunks")

CACHES = {
    "full": dataclasses.replace(SMALL, policy="full"),
    "quest": dataclasses.replace(SMALL, policy="quest"),
    "index_cache": dataclasses.replace(SMALL, policy="index_cache"),
    "flexi": SMALL,
    "flexi-adaptive": ADAPTIVE,
    "flexi-coded": dataclasses.replace(SMALL, device_codec="int4", host_codec="int8"),
    # The others remember as h2o does, or as kvcrush.
    **{
        name: dataclasses.replace(SMALL, policy=policy)
        for name, policy in DROPPING.items()
        if name not in ("a2sf", "treekv")
    },
}
PREFILL = ("prefill_chunk", "prefill_last_layer")
PROGRAMS = (*PREFILL, "commit_layer", "decode_steps", "end_chunk_layer")
# What full has nothing to do in.
NOTHING_TO_END = ("full",)


@dataclasses.dataclass(frozen=True)
class Ran:
    """One program that `generate` ran. arguments: shapes; donate: indices into them."""

    function: Callable
    arguments: tuple
    donate: tuple[int, ...]
    compiled: jax.stages.Compiled

    @property
    def donated(self):
        return [self.arguments[at] for at in self.donate]


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module", params=CACHES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def ran(name, lm):
    """{program: what was run of it}, of two requests in one batch."""
    found: dict[str, dict[object, Ran]] = {}

    class Watched(Runner):
        def run(self, stage, function, static, args, donate=()):
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
            # For the very arguments of the call, which then compiles nothing.
            compiled = jitted(function, static, donate).lower(*args).compile()
            of = found.setdefault(function.__name__, {})
            of[static] = Ran(function, shapes, donate, compiled)
            return super().run(stage, function, static, args, donate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "Runner", Watched)
        prompts = [prompt_of(37), prompt_of(52)]
        flexijax.generate(lm, prompts, max_new_tokens=20, cache=CACHES[name])
    return {function: list(of.values()) for function, of in found.items()}


@pytest.fixture(params=PROGRAMS)
def program(request, name, ran):
    """All that was run of one program: one for each kind of layer."""
    if request.param == "end_chunk_layer" and name in NOTHING_TO_END:
        assert request.param not in ran
        pytest.skip("its groups have nothing to do at the end of a chunk")
    return ran[request.param]


def test_every_donated_array_is_updated_in_place(program):
    for ran in program:
        assert ran.donated, "nothing is donated"
        memory = ran.compiled.memory_analysis()
        aliased = memory.alias_size_in_bytes + memory.host_alias_size_in_bytes
        # Those that are handed through unchanged are among them.
        assert aliased == nbytes(ran.donated) > 0


def pools(ran):
    """The shape of each array that grows with the text: keys, values and summaries."""
    arrays = ran.donated
    if ran.function.__name__ == "decode_steps":
        arrays = (arrays, ran.arguments[1])  # those that steps only read
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if leaf.ndim >= 4 or _is_coded(leaf)]
    if ran.function.__name__ in PREFILL:
        # The window of last queries moves on with every chunk; it does not grow.
        *x, kv = ran.donated
        leaves = [*x, kv.k, kv.v]
    return [",".join(map(str, leaf.shape)) for leaf in leaves]


def _is_coded(leaf):
    """Pages of words; what remembers tokens by head is of three axes too, and moves with them."""
    return leaf.ndim == 3 and leaf.dtype == jnp.uint32


def copied_shapes(compiled):
    return set(re.findall(r"= \w+\[([\d,]*)\]\S* copy(?:-start)?\(", compiled.as_text()))


def test_no_pool_is_copied_and_nobody_is_called(program):
    for ran in program:
        assert len(pools(ran)) >= 2
        assert not set(pools(ran)) & copied_shapes(ran.compiled)
        text = ran.compiled.as_text()
        assert "callback" not in text and "infeed" not in text and "outfeed" not in text


def test_a_copy_would_be_seen():
    """What is not donated has to be copied."""
    kept = jax.jit(lambda x: x.at[0].set(1.0)).lower(jnp.zeros((5, 7))).compile()
    assert "5,7" in copied_shapes(kept)


def test_a_second_call_compiles_nothing(name, ran, lm):
    """Of the same sizes: counted as jax does, eager operations included."""
    compiled: list[str] = []

    def count(event: str, _: float, **__) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x * 5 - 2)(jnp.ones(3))
        assert compiled, "jax counts under another name now"
        compiled.clear()
        prompts = [prompt_of(37, seed=5), prompt_of(52, seed=6)]
        flexijax.generate(lm, prompts, max_new_tokens=20, cache=CACHES[name])
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert set(ran) >= {"prefill_chunk", "commit_layer", "decode_steps"}
    assert not compiled


def places(tree):
    """Where the arrays of a cache lie in memory."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_what_runs_updates_in_place_too(name, lm):
    """The memory of every array of the cache is that of the same array before the steps."""
    cache = CACHES[name]
    program = make_program(lm, cache, max_tokens=72, max_new_tokens=20, batch=2)
    engine = ModelRunner(lm, program, progress=None)
    engine.admit(request_of(37, max_new_tokens=20), "")
    engine.admit(request_of(50, max_new_tokens=20, index=1), "")
    old = engine.cache
    assert old is not None
    before = places(all_rows(old).layers)
    engine.step()
    assert len(before) >= 4 and engine.cache is not None
    assert places(all_rows(engine.cache).layers) == before
    held = jax.tree.leaves([layer.groups for layer in all_rows(old).layers])
    assert all(leaf.is_deleted() for leaf in held)
