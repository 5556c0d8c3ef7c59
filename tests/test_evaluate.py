"""`evaluate`: what diverges and what does not, that it resumes, and what a row counts."""

import dataclasses
import importlib

import jax.numpy as jnp
import numpy as np
import pytest

import flexijax
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.plan import make_program
from flexijax.evaluate import evaluate
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from flexijax.profiles.documents import prompt_ids
from tests.planted import WORDS, planted_model, text_document, words_tokenizer
from tests.tiny_models import tiny_model

# The name is the function's in the package.
MODULE = importlib.import_module("flexijax.evaluate")
PAGE, BUDGET, STEPS = 4, 32, 16
SIZES = {"max_tokens": 120, "steps": STEPS}


def config(**changes) -> flexijax.CacheConfig:
    values = dict(policy="quest", page_size=PAGE, budget_tokens=BUDGET, rerank_interval=8)
    return flexijax.CacheConfig(**(values | changes))


def flexi(**changes) -> flexijax.CacheConfig:
    return config(policy=Flexi(unstable=((1,), ())), **changes)


def tiny(stop_ids=()) -> flexijax.LanguageModel:
    """Attention matters to what it says, and it can read documents."""
    tokenizer = dataclasses.replace(words_tokenizer(), stop_ids=frozenset(stop_ids))
    return dataclasses.replace(tiny_model(vocab_size=len(WORDS)), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def lm():
    return tiny()


@pytest.fixture(scope="module")
def documents():
    return [text_document("b", 1), text_document("a", 2)]


@pytest.fixture
def measured(monkeypatch):
    """What is measured, by (document, configs), with made-up numbers instead."""
    calls = []

    def measure(self, prompt, names, label):
        calls.append((label, *names))
        for name in names:
            values = {"context": len(prompt), "tokens": 16, "steps": 16, "kl": len(calls) / 8}
            values |= dict.fromkeys(("agreement", "promoted_pages", "evicted_tokens"), 0)
            values |= dict.fromkeys(("mean_interval", "rco"))
            yield name, values | dict.fromkeys(("device_bytes", "summary_bytes", "host_bytes"), 0)

    monkeypatch.setattr(MODULE._Run, "measure", measure)
    return calls


def test_only_what_is_left_out_diverges(lm, documents):
    """Full against itself: nothing. With room for all: rounding. With room for a quarter: more."""
    configs = {
        "full": config(policy="full"),
        "roomy flexi": flexi(budget_tokens=256),
        "flexi": flexi(),
        "streaming_llm": config(policy="streaming_llm"),
    }
    found = evaluate(lm, documents, configs, **SIZES)
    # Documents in order, and in each of them the configs in order.
    assert [(row.task, row.index, row.config) for row in found.rows] == [
        (task, index, name) for task, index in (("b", 1), ("a", 2)) for name in configs
    ]
    for row in found.rows:
        assert (row.context, row.tokens, row.steps) == (120, STEPS, STEPS)
        if row.config == "full":
            assert (row.kl, row.agreement) == (0.0, 1.0)
        elif row.config.startswith("roomy"):
            assert abs(row.kl) < 1e-6 and row.agreement == 1.0
        else:
            assert row.kl > 1e-4
    means = {one.config: one for one in found.summary(base="flexi")}
    assert (means["flexi"].ratio, means["full"].ratio) == (1.0, 0.0)


def test_what_is_moved_and_kept_is_counted(lm, documents):
    configs = {
        "full": config(policy="full"),
        "flexi": flexi(),
        "streaming_llm": config(policy="streaming_llm"),
    }
    full, mine, streaming = evaluate(lm, documents[:1], configs, **SIZES).rows
    heads, page_bytes, pages = 4, 2 * PAGE * 8 * 4, 120 // PAGE
    assert full.device_bytes == heads * pages * page_bytes
    assert full.summary_bytes == full.host_bytes == full.promoted_pages == full.evicted_tokens == 0
    assert (full.mean_interval, full.rco) == (None, None)
    # One of four heads is unstable; the others keep the budget and the pages of one interval.
    kept = pages + 3 * (BUDGET // PAGE + 8 // PAGE)
    assert mine.device_bytes - mine.summary_bytes == kept * page_bytes
    assert mine.host_bytes == 3 * pages * page_bytes
    assert mine.summary_bytes > 0 and mine.promoted_pages > 0 and mine.evicted_tokens == 0
    assert mine.mean_interval == 8 and mine.rco is not None and -1 <= mine.rco <= 1
    assert streaming.evicted_tokens == heads * (120 + STEPS - BUDGET)
    assert (streaming.mean_interval, streaming.rco, streaming.host_bytes) == (None, None, 0)


def test_heads_that_keep_their_choice_have_a_greater_rco():
    lm, unstable = planted_model()
    right = Flexi(unstable=tuple((head,) for _, head in sorted(unstable)))
    # Each planted unstable head is called stable.
    wrong = Flexi(unstable=tuple(((head + 1) % 4,) for _, head in sorted(unstable)))
    configs = {"right": config(policy=right), "wrong": config(policy=wrong)}
    one, other = evaluate(lm, [text_document("a", 0)], configs, max_tokens=300, steps=64).rows
    assert one.rco is not None and other.rco is not None
    assert one.rco > 0.8 > other.rco + 0.1
    assert one.promoted_pages < other.promoted_pages


def test_intervals_are_compared_on_one_text(lm, documents):
    """Never doubled is 16 at first and 8 from then on; always doubled is 16, then 32."""
    paces = {
        "8": 8,
        "16": 16,
        "longer": Adaptive(lengthen_at=-9.0, shorten_at=-9.0),
        "shorter": Adaptive(lengthen_at=9.0, shorten_at=9.0),
    }
    configs = {name: flexi(rerank_interval=pace) for name, pace in paces.items()}
    rows = evaluate(lm, documents[:1], configs, max_tokens=300, steps=44).rows
    assert [row.mean_interval for row in rows] == [8, 16, 24, 48 / 5]
    assert rows[0].promoted_pages > rows[1].promoted_pages > 0
    assert {(row.tokens, row.steps) for row in rows} == {(44, 48)}


def test_a_file_of_records_says_the_same(lm, documents, tmp_path):
    """With nothing made up: every digit comes back."""
    asked = (lm, documents[:1], {"it": flexi()})
    first = evaluate(*asked, records=tmp_path / "records.jsonl", **SIZES)
    assert evaluate(*asked, records=tmp_path / "records.jsonl", **SIZES) == first
    assert evaluate(*asked, **SIZES) == first


def test_rows_are_measured_once(lm, documents, measured, tmp_path, monkeypatch):
    records = tmp_path / "records.jsonl"
    configs = {"one": config(), "two": flexi()}
    first = evaluate(lm, documents, configs, records=records, **SIZES)
    assert measured == [("b[1]", "one", "two"), ("a[2]", "one", "two")]
    assert [row.kl for row in first.rows] == [1 / 8, 1 / 8, 2 / 8, 2 / 8]
    assert evaluate(lm, documents, configs, records=records, **SIZES) == first
    assert len(measured) == 2
    # Neither a name nor what else is compared is part of a number.
    renamed = evaluate(lm, documents, {"other": flexi()}, records=records, **SIZES)
    assert [(row.config, row.kl) for row in renamed.rows] == [("other", 1 / 8), ("other", 2 / 8)]
    assert len(measured) == 2
    # Only what is new is measured, and only on documents that lack it.
    more = {**configs, "bound": config(policy=Flexi(score=MinMax(), unstable=((1,), ())))}
    evaluate(lm, documents[:1], more, records=records, **SIZES)
    assert evaluate(lm, documents, more, records=records, **SIZES).rows[:2] == first.rows[:2]
    assert measured[2:] == [("b[1]", "bound"), ("a[2]", "bound")]
    # What an older version wrote says nothing.
    monkeypatch.setattr(MODULE, "VERSION", MODULE.VERSION + 1)
    assert evaluate(lm, documents, configs, records=records, **SIZES) != first
    assert measured[4:] == measured[:2]


@pytest.mark.parametrize(
    "change",
    [
        {"budget_tokens": 36},
        {"rerank_interval": 16},
        {"rerank_interval": Adaptive(lengthen_at=0.9)},
        {"policy": "quest"},
        {"policy": Flexi(unstable=((0,), ()))},
        {"policy": Flexi(unstable=((1,), ()), score=MinMax("int8"))},
        {"dtype": "bfloat16"},
        {"page_size": 8},
        {"implementation": "xla"},
        {"transfer": "staged"},
    ],
    ids=str,
)
def test_a_changed_config_is_measured_again(change, lm, documents, measured, tmp_path):
    asked = (lm, documents[:1])
    records = tmp_path / "records.jsonl"
    evaluate(*asked, {"it": flexi()}, records=records, **SIZES)
    evaluate(*asked, {"it": dataclasses.replace(flexi(), **change)}, records=records, **SIZES)
    assert measured == [("b[1]", "it")] * 2


def test_what_is_read_and_by_whom_is_part_of_a_row(lm, documents, measured, tmp_path):
    records = tmp_path / "records.jsonl"

    def measure(lm=lm, documents=documents[:1], **sizes):
        before = len(measured)
        evaluate(lm, documents, {"it": config()}, records=records, **(SIZES | sizes))
        return len(measured) > before

    assert measure()
    assert not measure()
    assert measure(max_tokens=119)
    assert measure(steps=8)
    assert measure(documents=[dataclasses.replace(documents[0], instruction="w7")])
    # The token ids of a document are the document.
    assert not measure(documents=[prompt_ids(documents[0], lm.tokenizer, max_tokens=120)])
    # Of one architecture and name, with other weights.
    other = tiny_model(vocab_size=len(WORDS), seed=1)
    assert measure(lm=dataclasses.replace(other, tokenizer=lm.tokenizer))
    assert measure(lm=tiny(stop_ids={59}))
    assert not measure()


def test_profiles_that_name_other_heads_are_other_configs(lm, documents, measured, tmp_path):
    def measure(unstable, source):
        profile = flexijax.HeadProfile(
            model=lm.name,
            num_layers=2,
            num_kv_heads=2,
            unstable=unstable,
            page_size=PAGE,
            budget_pages=8,
            source=source,
        )
        configs = {"it": config(policy="flexi", profile=profile)}
        evaluate(lm, documents[:1], configs, records=tmp_path / "records.jsonl", **SIZES)
        return len(measured)

    assert measure(((0, 1),), "by hand") == 1
    assert measure(((0, 1),), "written otherwise") == 1
    assert measure(((1, 1),), "by hand") == 2


def test_what_full_says_after_its_stop_token_is_not_compared(documents, monkeypatch, tmp_path):
    prompt = prompt_ids(documents[0], words_tokenizer(), max_tokens=120)
    full = config(policy="full")
    out = flexijax.generate(tiny(), [prompt], max_new_tokens=STEPS, cache=full)[0]
    stop = next(at for at in range(1, STEPS) if out.token_ids[at] not in out.token_ids[:at])
    found = evaluate(tiny({out.token_ids[stop]}), documents[:1], {"it": config()}, **SIZES)
    assert [row.tokens for row in found.rows] == [stop]
    assert found.rows[0].steps == -(-stop // 8) * 8
    # Where nothing is left of the answer there is no row, which is remembered as well.
    asked = (tiny({out.token_ids[0]}), documents[:1], {"it": config()})
    records = tmp_path / "records.jsonl"
    assert evaluate(*asked, records=records, **SIZES).rows == ()
    monkeypatch.delattr(MODULE._Run, "measure")
    assert evaluate(*asked, records=records, **SIZES).rows == ()


def test_full_must_choose_its_own_tokens_again(lm, documents, monkeypatch):
    class Wrong(MODULE.Continuation):
        def greedy(self, count):
            return [(token + 1) % len(WORDS) for token in super().greedy(count)]

    monkeypatch.setattr(MODULE, "Continuation", Wrong)
    with pytest.raises(RuntimeError, match="does not choose them again"):
        evaluate(lm, documents[:1], {"it": config()}, **SIZES)


def test_progress_names_the_document(lm, documents):
    stages = []
    evaluate(
        lm, documents[:1], {"it": config()}, progress=lambda *call: stages.append(call), **SIZES
    )
    assert ("reading b[1]", 120, 120) in stages
    assert stages[-1] == ("comparing on b[1]", 1, 1)


def test_full_attention_compiles_its_steps_once(lm, documents):
    """However many chunks its answer has."""
    stages = []
    evaluate(
        lm,
        documents[:1],
        {"it": config()},
        max_tokens=104,
        steps=24,
        progress=lambda *call: stages.append(call),
    )
    assert stages.count(("compiling decode", 1, 1)) == 1


def test_agreement_counts_choices_on_a_given_text(lm, documents):
    prompt = prompt_ids(documents[0], lm.tokenizer, max_tokens=120)
    full, roomy = config(policy="full"), config(budget_tokens=256)
    tokens = flexijax.generate(lm, [prompt], max_new_tokens=11, cache=full)[0].token_ids

    def agreeing(cache, tokens):
        program = make_program(lm, cache, max_tokens=len(prompt) + 16, max_new_tokens=16)
        return Continuation(lm, program, read(lm, [program], prompt)).agreeing(tokens)

    assert agreeing(full, tokens) == 11
    assert agreeing(roomy, tokens) == 11
    assert agreeing(full, [(tokens[0] + 1) % 60]) == 0
    assert agreeing(full, []) == 0
    answers = flexijax.compare(lm, prompt, {"roomy": roomy, "full": full}, max_new_tokens=11)
    assert answers.agreement == {"roomy": 11}
    assert answers.answers["roomy"].token_ids == answers.answers["full"].token_ids == tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"documents": "a text"}, r"documents='a text' must be a list"),
        ({"documents": [["w1"]]}, r"documents\[0\]=\['w1'\] must be a Document or a list of token"),
        ({"documents": [[1], []]}, r"documents\[1\] has 0 tokens, it must have 1 to max_tokens=12"),
        ({"documents": [[1] * 121]}, r"documents\[0\] has 121 tokens"),
        ({"documents": [[1, 60]]}, r"documents\[0\] holds token 60, not in 0..59"),
        ({"configs": {}}, r"configs=\{\} must be a dict"),
        ({"configs": {"a": "flexi"}}, r"configs\['a'\]='flexi' must be a CacheConfig"),
        (
            {"configs": {"a": config(), "b": config(page_size=8)}},
            r"configs\['b'\] has page_size=8, configs\['a'\] 4",
        ),
        (
            {"configs": {"a": config(), "b": config(dtype="bfloat16")}},
            r"configs\['b'\] has dtype='bfloat16'",
        ),
        ({"configs": {"a": config(policy="flexi")}}, "profile=None: no profile of"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"steps": 1.5}, "steps=1.5 must be an integer"),
        ({"steps": 400}, "max_tokens=120 and steps=400, in chunks of 8 .* can read at most 512"),
        (
            {"configs": {"a": config(), "b": config(rerank_interval=49)}},
            "chunks of 392 that are whole for the rerank_interval of every config, are 512 tokens",
        ),
    ],
)
def test_bad_arguments_are_named(change, words, lm, documents):
    values = dict(documents=documents, configs={"a": config()}, **SIZES) | change
    if "392" in words:
        values["max_tokens"] = 121
        words = words.replace("512", "513")
    with pytest.raises(ValueError, match=words):
        evaluate(lm, values.pop("documents"), values.pop("configs"), **values)


def test_documents_need_a_tokenizer(documents):
    with pytest.raises(ValueError, match=r"documents\[0\] is text, but tiny-llama has no token"):
        evaluate(tiny_model(), documents, {"a": config()}, **SIZES)
    prompt = np.random.default_rng(0).integers(0, 97, 90).tolist()
    rows = evaluate(tiny_model(dtype=jnp.float32), [prompt], {"a": config()}, **SIZES).rows
    assert [(row.task, row.index, row.context) for row in rows] == [("prompt", 0, 90)]
