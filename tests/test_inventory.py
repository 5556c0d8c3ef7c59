"""The inventory lists every program that `generate` runs, in the forms in which it runs them."""

from collections import Counter

import jax
import pytest

import flexijax
from flexijax.engine.inventory import decode_calls, prompt_calls
from flexijax.engine.jit_cache import forget_compiled
from flexijax.engine.plan import make_program
from flexijax.policies.snapkv import SnapKV
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("short_chunks")

PROFILE = flexijax.HeadProfile(
    model="tiny-llama",
    num_layers=2,
    num_kv_heads=2,
    unstable=((0, 1),),
    page_size=4,
    budget_pages=4,
    source="by hand",
)


@pytest.mark.parametrize(
    "policy", ["full", "quest", "flexi", "streaming_llm", SnapKV(window=4), "h2o"], ids=str
)
def test_generate_compiles_each_program_of_the_inventory_once(policy):
    lm, stages, names = tiny_model(), [], []
    cache = flexijax.CacheConfig(
        policy=policy, page_size=4, budget_tokens=16, rerank_interval=8, profile=PROFILE
    )
    program = make_program(lm, cache, max_tokens=60, max_new_tokens=20)
    listed = [*prompt_calls(program, lm.params), *decode_calls(program, lm.params)]
    forget_compiled()

    def progress(stage, done, total):
        if stage.startswith("compiling ") and done == 0:
            stages.append(stage.removeprefix("compiling "))

    def compiled(event, seconds, fun_name="", **_):
        if event.endswith("/backend_compile_duration"):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(compiled)
    try:
        out = flexijax.generate(
            lm, [list(range(40))], max_new_tokens=20, cache=cache, progress=progress
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(compiled)
    assert len(out[0].token_ids) == 20
    assert Counter(stages) == Counter(call.stage for call in listed)
    # As often as jax itself says, too: a trace that the compiler is spared would not show above.
    functions = [call.function.__name__ for call in listed]
    for function in set(functions):
        assert sum(function in name for name in names) == functions.count(function)
    layers = sum(call.calls for call in listed if call.stage == "commit")
    assert layers == lm.attention.num_layers
