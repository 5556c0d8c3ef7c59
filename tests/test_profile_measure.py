"""The profiler against a NumPy oracle on a tiny model, and on a model with planted heads."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexijax import profiles
from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.models.dense import dense_attend
from flexijax.models.language_model import from_config
from flexijax.pallas_kernels.sketch_scores import reference
from flexijax.pallas_kernels.sketches import SPACING
from flexijax.profiles.documents import prompt_ids, read_documents
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiling import measure
from flexijax.profiling.profile import make_profile
from flexijax.profiling.record import record
from flexijax.profiling.settings import Settings
from tests.planted import WORDS, planted_model, text_document, words_tokenizer

PAGE, STEPS, BUDGETS = 4, 32, (3, 6)
RERANK = 16  # steps after which a stale choice is made anew


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig(
        family="llama",
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_context=600,
        rope_theta=10000.0,
        rope_scaling=None,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        qkv_bias=False,
        qk_norm=False,
    )
    params = Decoder(config).init(jax.random.key(0), dtype=jnp.float32)
    return from_config(config, params, name="tiny", dtype=jnp.float32, tokenizer=words_tokenizer())


@pytest.fixture(scope="module")
def planted():
    return planted_model()


@pytest.fixture(scope="module")
def prompt():
    # Longer than one block of the prefill and ending inside of a page.
    return [int(token) for token in np.random.default_rng(1).integers(6, 60, size=529)]


@pytest.fixture(scope="module")
def oracle(tiny, prompt):
    """Tokens, page choices, mass and stale mass of the tiny model, one dense pass per step."""
    shape = tiny.attention
    dense = dense_attend(shape)

    @jax.jit
    def run(tokens):
        def attend(layer, q, k, v, seen):
            out, _ = dense(layer, q, k, v, None)
            return out, (*seen, (q[0], k[0]))

        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x, seen = tiny.decoder.hidden(tiny.params, tokens, positions, attend, ())
        return tiny.decoder.logits(tiny.params, x[0]), seen

    # Full attention's own tokens, each checked against the whole sequence before it.
    sizes = {"steps": STEPS, "page_size": PAGE, "budgets": BUDGETS, "capacity": 570}
    said = record(tiny, prompt, **sizes).tokens.tolist()
    logits, seen = run(jnp.asarray([prompt + said], jnp.int32))
    best = np.array(logits[len(prompt) - 1 : -1])
    best[:, 5] = -np.inf  # the stop token is never said
    assert best.argmax(-1).tolist() == said
    choices, masses, stale = ({"minmax": [], "sketch2": [], "mass": []} for _ in range(3))
    for step in range(STEPS):
        now = len(prompt) + step
        scored = [choose(np.asarray(q), np.asarray(k), now, shape, len(prompt)) for q, k in seen]
        for kind in choices:
            choices[kind].append([layer[kind][0] for layer in scored])
            masses[kind].append([layer[kind][1] for layer in scored])
            stale[kind].append(
                [
                    [stale_mass(choices[kind], page, (step, layer, head)) for head, page in each]
                    for layer, each in enumerate(enumerate(of["pages"]) for of in scored)
                ]
            )
    return said, choices, masses, stale


def stale_mass(choices, mass, where):
    """Of a step's mass of every page what the choice 16 steps before holds, at each budget.

    choices: of each step, layer and head; where: step, layer, head. Pages begun since are attended.
    """
    step, layer, head = where
    if step < RERANK:
        return [np.nan] * len(BUDGETS)
    then = choices[step - RERANK][layer][head]
    newest_then = max(then)  # by rule among those chosen
    return [mass[sorted({*then[:n], *range(newest_then + 1, len(mass))})].sum() for n in BUDGETS]


def choose(q, k, now, shape, length):
    """By kind of score: (pages of each head best first, mass at each budget), q and k [T, ., H].

    Under "pages" the mass of every page. length: tokens of the prompt.
    """
    grouped = q[now].reshape(shape.num_kv_heads, -1, q.shape[-1]).astype(np.float64)
    pages = now // PAGE + 1
    result = {"minmax": ([], []), "sketch2": ([], []), "mass": ([], []), "pages": []}
    for head in range(shape.num_kv_heads):
        keys = k[: now + 1, head].astype(np.float64)
        logits = grouped[head] @ keys.T * shape.scale
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        parts = [slice(at * PAGE, (at + 1) * PAGE) for at in range(pages)]
        mass = np.array([weights[part].sum() for part in parts])
        result["pages"].append(mass)
        bound = [
            np.maximum(grouped[head] * keys[part].min(0), grouped[head] * keys[part].max(0))
            .sum(axis=1)
            .max()
            for part in parts
        ]
        sketched = sketch_score(grouped[head] * shape.scale, keys, length)
        for kind, score in (
            ("minmax", np.array(bound)),
            ("sketch2", np.append(sketched, -np.inf)[:pages]),
            ("mass", mass.copy()),
        ):
            score[[0, -1]] = np.inf
            best = np.argsort(-score, kind="stable")[: BUDGETS[-1]]
            result[kind][0].append(best)
            result[kind][1].append([mass[best[:budget]].sum() for budget in BUDGETS])
    return result


def sketch_score(q, keys, length):
    """Log of the mean over queries q [G, H] of each full page's share of attention to keys [S, H].

    Keys are rounded to 2 bits by the code of the first `length` of them, and queries to 6 bits.
    """
    mean, step = reference.sketch_code(keys[:length], spacing=SPACING[2])
    levels = reference.sketch_levels(keys, mean, step, bits=2) - 1.5
    rotated = q @ reference.hadamard(q.shape[1])
    unit = np.abs(rotated * step).max(axis=1, keepdims=True) / 31
    logits = unit * (np.round(rotated * step / unit) @ levels.T) + (rotated @ mean)[:, None]
    full = len(keys) // PAGE
    pages = np.exp(logits[:, : full * PAGE]).reshape(len(q), full, PAGE).sum(axis=2)
    return np.log((pages / pages.sum(axis=1, keepdims=True)).mean(axis=0))


def test_recording_by_a_sketch_equals_the_oracle(tiny, prompt, oracle):
    said, choices, masses, stale = oracle
    sizes = {"steps": STEPS, "page_size": PAGE, "budgets": BUDGETS, "capacity": 570}
    seen = record(tiny, prompt, score="sketch2", **sizes)
    assert seen.tokens.tolist() == said
    # A key that lies on the edge of two levels may be rounded either way.
    same = seen.page_ids == np.array(choices["sketch2"])
    assert same.mean() > 0.98
    near = np.abs(seen.mass - np.array(masses["sketch2"])) < 1e-5
    assert near.mean() > 0.98
    near = np.abs(seen.stale_mass - np.array(stale["sketch2"])) < 1e-5
    assert near[RERANK:].mean() > 0.98
    assert not np.array_equal(seen.page_ids, np.array(choices["minmax"]))


@pytest.mark.parametrize("score", ["minmax", "mass"])
def test_recording_equals_the_oracle(tiny, prompt, oracle, score):
    said, choices, masses, stale = oracle
    sizes = {"steps": STEPS, "page_size": PAGE, "budgets": BUDGETS, "capacity": 570}
    seen = record(tiny, prompt, score=score, **sizes)
    assert seen.tokens.tolist() == said
    assert seen.pages.tolist() == [(529 + step) // PAGE + 1 for step in range(STEPS)]
    np.testing.assert_array_equal(seen.page_ids, np.array(choices[score]))
    np.testing.assert_allclose(seen.mass, np.array(masses[score]), atol=1e-5)
    assert seen.mass.min() > 1e-3  # zeros would not pass
    np.testing.assert_allclose(seen.stale_mass, np.array(stale[score]), atol=1e-5)
    assert np.abs(seen.mass - seen.stale_mass)[RERANK:].mean() > 1e-3  # nor would a fresh choice


def test_more_steps_change_nothing_before_them(tiny, prompt):
    sizes = {"page_size": PAGE, "budgets": BUDGETS, "capacity": 570}
    short = record(tiny, prompt, steps=16, **sizes)
    long = record(tiny, prompt, steps=32, **sizes)
    np.testing.assert_array_equal(long.page_ids[:16], short.page_ids)
    np.testing.assert_array_equal(long.mass[:16], short.mass)
    assert np.isnan(short.stale_mass).all() and np.isfinite(long.stale_mass[16:]).all()


def test_planted_heads_are_classified_without_error(planted):
    lm, unstable = planted
    settings = Settings(page_size=4, budgets=(8, 16), steps=32, max_tokens=300)
    documents = [text_document(task, seed) for task in "ab" for seed in range(2)]
    records = measure.measure_documents(lm, documents, settings)
    for budget in settings.budgets:
        profile = make_profile(lm, records, settings, budget=budget)
        assert profile.unstable == unstable
        assert profile.budget_pages == budget
        assert profile.measured["mean_cross_task_overlap"] == 1.0
        assert profile.measured["split_half_recall"] == 1.0
        assert profile.rco is not None
        rco = np.array(profile.rco, np.float64)
        mask = np.zeros(rco.shape, bool)
        mask[tuple(zip(*unstable, strict=True))] = True
        assert rco[mask].max() < 0.3 < 0.8 < rco[~mask].min()
        assert HeadProfile.from_json(profile.to_json()).unstable == unstable


def test_order_of_documents_and_tasks_does_not_matter(planted):
    lm, _ = planted
    settings = Settings(page_size=4, budgets=(8,), steps=32, max_tokens=300)
    documents = [text_document(task, seed) for task in "ab" for seed in range(2)]
    records = measure.measure_documents(lm, documents, settings)
    profiles = [make_profile(lm, order, settings, budget=8) for order in (records, records[::-1])]
    assert profiles[0].unstable == profiles[1].unstable
    np.testing.assert_allclose(
        np.array(profiles[0].rco, float), np.array(profiles[1].rco, float), atol=1e-4
    )


def test_an_interrupted_measurement_goes_on(planted, tmp_path, monkeypatch):
    lm, _ = planted
    settings = Settings(page_size=4, budgets=(8,), steps=32, max_tokens=300)
    documents = [text_document("a", seed) for seed in range(3)]
    whole = measure.measure_documents(lm, documents, settings)
    path = tmp_path / "records.jsonl"
    measure.measure_documents(lm, documents[:2], settings, records=path)
    path.write_text(path.read_text()[:-200])  # as if cut off while writing the second
    calls = []
    really = measure.measure_prompt

    def counted(*args, **named):
        calls.append(named["document"].index)
        return really(*args, **named)

    monkeypatch.setattr(measure, "measure_prompt", counted)
    resumed = measure.measure_documents(lm, documents, settings, records=path)
    assert calls == [1, 2]
    first, again = (make_profile(lm, r, settings, budget=8) for r in (whole, resumed))
    assert first == again
    measure.measure_documents(lm, documents, settings, records=path)
    assert calls == [1, 2]
    other = dataclasses.replace(settings, window=8)
    measure.measure_documents(lm, documents[:1], other, records=path)
    assert calls == [1, 2, 0]


def test_a_profile_from_one_prompt(planted):
    lm, unstable = planted
    tokens = [7] * 200
    profile = measure.profile_prompt(lm, tokens, page_size=4, budget_pages=8)
    assert profile.unstable == unstable
    seen = []
    measure.profile_prompt(
        lm, tokens, page_size=4, budget_pages=8, progress=lambda *at: seen.append(at)
    )
    # The prompt in chunks of prefill, then every 16 steps.
    assert seen[-5:] == [(200 + done, 264) for done in (0, 16, 32, 48, 64)]
    assert seen == sorted(set(seen)) and seen[0][0] > 0
    with pytest.raises(ValueError, match="prompt of 47 tokens .* at least 48"):
        measure.profile_prompt(lm, tokens[:47], page_size=4, budget_pages=8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"budgets": ()},
        {"budgets": (64, 32)},
        {"budgets": (1,)},
        {"fraction": 1.0},
        {"window": 65},
        {"window": 1},
        {"steps": 40},
        {"steps": 16, "window": 16},
        {"page_size": 0},
        {"score": "none"},
        {"unstable_by": "none"},
        {"max_tokens": 1024},
    ],
    ids=str,
)
def test_settings_name_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tokens": []}, "tokens"),
        ({"steps": 8}, "steps=8"),
        ({"budgets": (200,)}, "nothing to choose"),
        ({"capacity": 20}, "capacity=20"),
        ({"capacity": 700}, "at most 600"),
        ({"score": "best"}, "score='best'"),
    ],
)
def test_record_names_what_is_wrong(tiny, wrong, match):
    fine = {"steps": 16, "page_size": 4, "budgets": (3,), "capacity": 100, "tokens": [7] * 40}
    named = {**fine, **wrong}
    with pytest.raises(ValueError, match=match):
        record(tiny, named.pop("tokens"), **named)


def test_documents_of_json_lines_and_text(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [
        {"input": "one two", "instructions": ["sum up", "more"]},
        {"input": "one two", "instructions": ["again"]},
        {"input": "three"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    found = read_documents(path)
    assert [(d.task, d.index, d.text, d.instruction) for d in found] == [
        ("task", 0, "one two", "sum up"),
        ("task", 2, "three", ""),
    ]
    assert len(read_documents(path, limit=1)) == 1
    other = tmp_path / "other.jsonl"
    other.write_text('{"body": "text"}\n')
    assert read_documents(other, field="body")[0].text == "text"
    for bad, match in (('{"body": "x"}', "no text in input"), ("{", "line 1 is not JSON")):
        other.write_text(bad)
        with pytest.raises(ValueError, match=match):
            read_documents(other)
    plain = tmp_path / "plain.txt"
    plain.write_text("some text")
    assert read_documents(plain)[0].text == "some text"
    plain.write_text(" ")
    with pytest.raises(ValueError, match="holds no text"):
        read_documents(plain)


def test_prompts_are_cut_in_the_text_alone():
    tokenizer = words_tokenizer()
    document = text_document("a", 0)
    ids = prompt_ids(document, tokenizer, max_tokens=100)
    assert len(ids) == 100
    # The chat form around, the instruction behind.
    assert ids[0] == 1 and ids[-1] == 2 and tokenizer.decode(ids[-3:-1]) == "w8 w9"
    assert len(prompt_ids(document, tokenizer, max_tokens=10_000)) == 400 + 4
    with pytest.raises(ValueError, match="max_tokens=15"):
        prompt_ids(document, tokenizer, max_tokens=15)


def test_no_tokenizer_is_said(planted):
    lm, _ = planted
    with pytest.raises(ValueError, match="has no tokenizer"):
        measure.measure_documents(
            dataclasses.replace(lm, tokenizer=None), [text_document("a", 0)], Settings()
        )


def test_shipped_profile_of_smollm2_holds_a_quarter_of_the_heads():
    path = Path(profiles.__file__).parent / "smollm2-135m.json"
    profile = HeadProfile.load(path)
    assert (profile.num_layers, profile.num_kv_heads) == (30, 3)
    assert (profile.page_size, profile.budget_pages, len(profile.unstable)) == (16, 64, 22)
