"""FlexiCache written anew in PyTorch: it chooses what flexijax chooses, at every step."""

import dataclasses

import numpy as np
import pytest

import flexijax
from flexijax.pallas_kernels.page_scores import reference as bounds
from flexijax.pallas_kernels.page_selection import reference as selection
from flexijax.pallas_kernels.sketch_scores import reference as sketches
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from flexijax.policies.sketch import Sketch
from tests import tiny_models
from tests.tiny_runs import PROFILE, SMALL, prompt_of

torch = pytest.importorskip("torch", reason="the peer needs the torch extra")
parity = pytest.importorskip("tests.test_models_parity", reason="needs the torch extra")

from bench import pytorch_flexicache, pytorch_groups, pytorch_scores, same_pages  # noqa: E402

pytestmark = pytest.mark.any_jax

STEPS = 64


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, theirs) of the same random weights."""
    folder = tmp_path_factory.mktemp("model")
    theirs = parity.their_model(tiny_models.tiny_config("llama"))
    theirs.save_pretrained(folder)
    return flexijax.load(folder), theirs


def settings(score, **changes):
    made = pytorch_groups.Settings(
        unstable=tuple(map(PROFILE.unstable_heads, range(PROFILE.num_layers))),
        budget_tokens=SMALL.budget_tokens,
        page=SMALL.page_size,
        interval=SMALL.rerank_interval,
        score=score,
    )
    return dataclasses.replace(made, **changes)


def agreement(models, score, chosen, *, length=75, steps=STEPS, unread=8):
    """score: of flexijax. chosen: the peer's `Settings`. Programs are those of `length + steps`."""
    ours, theirs = models
    cache = dataclasses.replace(SMALL, profile=PROFILE, policy=Flexi(score=score))

    def make(program):
        return pytorch_flexicache.FlexiCache(theirs, chosen, room=program.layout.sizes.max_tokens)

    return same_pages.agree(ours, prompt_of(length), cache, make, steps=steps, unread=unread)


@pytest.mark.parametrize(
    ("name", "score", "length"),
    [("sketch2", Sketch(2), 75), ("minmax", MinMax(), 64)],
)
def test_the_same_pages_tokens_and_logits_for_64_steps(models, name, score, length):
    found = agreement(models, score, settings(name), length=length)
    assert found.wrong() == []
    assert len(found.tokens[0]) == STEPS
    # Of four pages at most five are attended of up to 35: chance would not choose them.
    assert found.pages > STEPS * 4 * SMALL.budget_pages


def test_what_differs_is_found(models):
    """A page score, an interval or a head that is another one."""
    right = settings("sketch2")
    for wrong in (
        dataclasses.replace(right, score="minmax"),
        dataclasses.replace(right, interval=right.interval // 2),
        dataclasses.replace(right, unstable=((0,), ())),
    ):
        found = agreement(models, Sketch(2), wrong, length=123, steps=16, unread=16)
        assert found.other or found.unread
        assert found.wrong()


def test_a_page_too_many_is_found(models):
    right = settings("sketch2")
    found = agreement(
        models, Sketch(2), dataclasses.replace(right, budget_tokens=20), length=123, steps=16
    )
    assert {layer for _, layer, *_ in found.unread} == {0}


def test_scores_equal_their_oracles():
    rng = np.random.default_rng(0)
    keys = torch.tensor(rng.normal(size=(1, 2, 40, 24)), dtype=torch.float64)
    q = torch.tensor(rng.normal(size=(1, 2, 3, 24)), dtype=torch.float64)
    pages = keys.view(1, 2, 10, 4, 24)
    sketch = pytorch_scores.Sketch2()
    state = sketch.fit(keys)
    summaries = sketch.summarize(pages, state)
    assert summaries[0].nbytes == 2 * 40 * 24 * 2 / 8
    found = sketch.scores(q, summaries, state)[0]
    matrix = sketches.hadamard(24)
    for head in range(2):
        mean, step = sketches.sketch_code(keys[0, head], spacing=pytorch_scores.SPACING)
        levels = sketches.sketch_levels(keys[0, head], mean, step, bits=2)
        for group in range(3):
            exact = q[0, head, group].numpy() @ matrix * 24**-0.5 * step
            unit = np.abs(exact).max() / 31
            rounded = np.round(exact / unit) * unit / step
            logits = (mean + step * (levels - 1.5)) @ rounded
            # The mean's product is not rounded.
            logits += mean @ (exact / step - rounded)
            wanted = np.log(np.exp(logits).reshape(10, 4).sum(-1))
            np.testing.assert_allclose(found[head, group], wanted, rtol=1e-9)
    bound = pytorch_scores.MinMax()
    low, high = bound.summarize(pages, ())
    stacked = torch.stack([low, high], dim=3)[0].swapaxes(0, 1)
    table, length = np.arange(10)[None], np.array([40])
    wanted = bounds.page_scores(q, stacked, table, length, page_size=4)
    np.testing.assert_allclose(bound.scores(q, (low, high), ())[:, :, 0], wanted, rtol=1e-9)


@pytest.mark.parametrize(("length", "known"), [(64, 64), (65, 64), (70, 64), (72, 64), (3, 0)])
@pytest.mark.parametrize("newer", [0, 2])
def test_choices_equal_the_oracle(length, known, newer):
    scores = np.random.default_rng(length).normal(size=(1, 2, 3, 20))
    scores[..., known // 4 :] = -np.inf
    wanted = selection.select_pages(
        scores, [length], [known], count=5, newer=newer, page_size=4, sinks=1
    )
    ranks = pytorch_scores.page_ranks(torch.tensor(scores), torch.tensor(known // 4))
    at = torch.tensor(length), torch.tensor(known // 4)
    found = pytorch_scores.choose(ranks, *at, 4, 5, newer)
    assert [{page for page in head if page >= 0} for head in found[0].tolist()] == wanted[0]


def test_what_a_product_rounded_the_other_way_changes_is_bounded():
    """By the definition: each product in turn a unit off, over pages of one token."""
    rng = np.random.default_rng(1)
    keys = torch.tensor(rng.normal(size=(1, 2, 40, 24)), dtype=torch.float64)
    q = torch.tensor(rng.normal(size=(1, 2, 3, 24)), dtype=torch.float64)
    sketch = pytorch_scores.Sketch2()
    state = sketch.fit(keys)
    found = sketch.resolution(q, state)[0].numpy()
    matrix = sketches.hadamard(24)
    for head in range(2):
        mean, step = sketches.sketch_code(keys[0, head], spacing=pytorch_scores.SPACING)
        levels = sketches.sketch_levels(keys[0, head], mean, step, bits=2)
        units = np.abs(q[0, head].numpy() @ matrix * 24**-0.5 * step).max(-1) / 31
        changes = units[:, None, None] * np.abs(levels - 1.5)  # of a query head, token, channel
        np.testing.assert_allclose(found[head], changes.max(), rtol=1e-12)
    assert pytorch_scores.MinMax().resolution(q, ()).tolist() == [[0.0, 0.0]]


def test_only_pages_at_the_cut_are_undecided():
    ranks = torch.tensor([9.0, 5.0, 4.0, 3.9, 1.0, -float("inf")])
    assert pytorch_scores.close_to_cut(ranks, {0, 1, 2, 5}, 0.0) == set()
    assert pytorch_scores.close_to_cut(ranks, {0, 1, 2, 5}, 0.2) == {2, 3}
    assert pytorch_scores.close_to_cut(ranks, {0, 1, 2, 3, 4, 5}, 9.0) == set()


@pytest.mark.skipif(pytorch_flexicache.can_compile() is not None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the compiler imports
def test_compiled_says_the_same():
    """Of one layer with a head of each kind: every other one would be compiled for itself."""
    theirs = parity.their_model(tiny_models.tiny_config("llama", num_layers=1))
    prompt, found = torch.tensor([prompt_of(75), prompt_of(75, seed=1)]), []
    for compiled in (False, True):
        flexi = pytorch_flexicache.FlexiCache(
            theirs, settings("sketch2", unstable=((1,),)), room=128, compiled=compiled
        )
        logits = [flexi.read(prompt)]
        for _ in range(20):
            logits.append(flexi.step(logits[-1].argmax(-1)))
        found.append((torch.stack(logits), flexi.chosen(), flexi.resident()))
    (eager, *pages), (made, *others) = found
    torch.testing.assert_close(eager, made, rtol=1e-4, atol=1e-4)
    assert pages == others


def test_what_cannot_run_says_so(models, monkeypatch):
    _, theirs = models
    with pytest.raises(ValueError, match="15 tokens of a prompt are fewer than the budget"):
        flexi = pytorch_flexicache.FlexiCache(theirs, settings("sketch2"), room=64)
        flexi.read(torch.tensor([prompt_of(15)]))
    monkeypatch.setattr(pytorch_flexicache.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        pytorch_flexicache.FlexiCache(theirs, settings("sketch2"), room=64, compiled=True)
