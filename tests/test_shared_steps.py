"""Methods that drop tokens run the same decode steps: what ranks them is compiled apart."""

import dataclasses
from collections import Counter

import jax
import pytest

import flexijax
from flexijax.engine.inventory import decode_calls
from flexijax.engine.jit_cache import forget_compiled
from flexijax.engine.plan import make_program
from tests.dropping import GROWING, PLACING, WATCHING
from tests.tiny_models import tiny_model
from tests.tiny_runs import SMALL, prompt_of


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def steps_of(lm, policy):
    """What a policy's decode steps are run by, and the shapes that they are run with."""
    cache = dataclasses.replace(SMALL, policy=policy)
    program = make_program(lm, cache, max_tokens=60, max_new_tokens=20)
    (steps,) = (call for call in decode_calls(program, lm.params) if call.stage == "decode")
    leaves, structure = jax.tree.flatten(steps.args)
    return steps.jitted(), structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


KINDS = {"watching": WATCHING, "placing": PLACING, "growing": GROWING}


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_drop_share_their_steps(kind, lm):
    first, *others = (steps_of(lm, policy) for policy in KINDS[kind].values())
    assert all(steps[0] is first[0] and steps[1:] == first[1:] for steps in others)


def test_methods_that_are_not_kept_alike_have_steps_of_their_own(lm):
    found = [next(iter(of_kind.values())) for of_kind in KINDS.values()]
    found += ["quest", "index_cache", "full"]
    assert len({id(steps_of(lm, policy)[0]) for policy in found}) == 6


def test_another_method_compiles_no_steps(lm, short_chunks):
    """Counted as it runs: what observes and ranks is compiled, and the first needs nothing anew."""
    forget_compiled()

    def compiled(policy):
        stages = Counter()

        def progress(stage, done, total):
            if stage.startswith("compiling ") and done == 0:
                stages[stage.removeprefix("compiling ")] += 1

        cache = dataclasses.replace(SMALL, policy=policy)
        flexijax.generate(lm, [prompt_of(40)], max_new_tokens=9, cache=cache, progress=progress)
        return stages

    one, other = WATCHING["treekv"], WATCHING["morphkv"]
    first, second = compiled(one), compiled(other)
    assert first["decode"] == 1 and "decode" not in second
    assert second["commit"] >= 1 and second["end of a chunk"] >= 1
    assert not compiled(one) and not compiled(other)
