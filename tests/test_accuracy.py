"""The bench of answers: metrics by hand, retention, what is asked, and a quick run of it."""

import dataclasses
import json

import numpy as np
import pytest

from bench import accuracy, accuracy_scores, accuracy_tasks
from flexijax.profiles.documents import Document
from tests.planted import words_tokenizer
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.any_jax


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        # Lin 2004, section 3: "police killed the gunman" against three candidates, LCS 3, 2 and 2.
        ("police kill the gunman", ["police killed the gunman"], 1.0),  # stemmed
        ("police kick the gunman", ["police killed the gunman"], 3 / 4),
        ("the gunman kill police", ["police killed the gunman"], 2 / 4),
        # LCS "the cat sat" of 3 and 6 words: precision 1, recall 1/2.
        ("The cat sat.", ["the cat quietly sat down there"], 2 / 3),
        ("The cat sat.", ["a dog", "the cat quietly sat down there"], 2 / 3),
        ("", ["a dog"], 0.0),
    ],
)
def test_rouge_l_by_hand(answer, references, expected):
    pytest.importorskip("rouge_score", reason="ROUGE-L needs the bench extra")
    assert accuracy_scores.rouge_l(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The cat, the dog!", ["a CAT dog"], 1.0),
        ("cat cat bird", ["cat dog"], 2 * 1 / (3 + 2)),  # a word counts as often as both have it
        ("bird", ["cat", "bird cat"], 2 / 3),
        ("the", ["cat"], 0.0),
        ("the", ["a"], 0.0),
    ],
)
def test_f1_by_hand(answer, references, expected):
    assert accuracy_scores.token_f1(answer, references) == pytest.approx(expected)


def test_a_number_is_found_as_a_whole_alone():
    assert accuracy_scores.found("It is 12345.", ["12345"]) == 1.0
    assert accuracy_scores.found("It is 123456.", ["12345"]) == 0.0
    assert accuracy_scores.found("It is 1234", ["12345"]) == 0.0


def test_records_count_once_and_by_name_and_number():
    right = ("Ada: 5", "Tom: 7", "Eve: 9")
    answer = (
        '[{"name": "Ada", "coins": 5}, {"coins": "7", "name": "Tom"}, {"name": "Ada", "coins": 5},'
        ' {"name": "Eve", "coins": 8}, {broken}, {"name": "Eve", "coi'
    )
    assert accuracy_scores.records_found(answer, right) == pytest.approx(2 / 3)
    assert accuracy_scores.records_found("Ada 5, Tom 7", right) == 0.0


def test_retention_is_the_mean_of_the_ratios_of_tasks():
    full = {"a": [0.2, 0.4], "b": [0.1, 0.1, 0.1]}
    mine = {"a": [0.2, 0.1], "b": [0.2, 0.1, 0.0]}
    # (0.15 / 0.3 + 0.1 / 0.1) / 2
    mean, low, high = accuracy_scores.retention(mine, full)
    assert mean == pytest.approx(0.75) and low < 0.75 < high
    assert accuracy_scores.retention(mine, full) == (mean, low, high)
    # Pairs stay together: what is half of it everywhere has no spread.
    halves = {task: [value / 2 for value in of] for task, of in full.items()}
    assert accuracy_scores.retention(halves, full) == pytest.approx((0.5, 0.5, 0.5))
    # Of two documents a draw is (0, 0), (1, 1) or one of each.
    assert accuracy_scores.ratio([0.2, 0.1], full["a"]) == pytest.approx((0.5, 0.25, 1.0))


def test_retention_of_what_full_cannot_do():
    assert np.isnan(accuracy_scores.retention({}, {})).all()
    assert np.isnan(accuracy_scores.ratio([1.0], [0.0])).all()
    # Draws of zeros alone are left out: the others are 1.
    assert accuracy_scores.ratio([0.0, 1.0], [0.0, 1.0]) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="'a' has 1 scores, full attention 2"):
        accuracy_scores.retention({"a": [1.0]}, {"a": [1.0, 1.0]})


def test_chance_is_what_other_documents_answers_get():
    assert accuracy_scores.chance(["x", "y"], [["x"], ["x"]], "found") == 0.5
    assert accuracy_scores.chance(["x"], [["x"]], "found") is None


def words(text):
    return len(text.split())


def test_files_of_leval(tmp_path):
    path = tmp_path / "task.jsonl"
    one = {"input": "a b", "instructions": ["q1", "q2"], "outputs": ["x y z", "w"]}
    lines = [one, one, one | {"input": "c", "evaluation": "f1"}, one | {"input": "d"}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = list(accuracy_tasks.from_leval(path, new_tokens=2, count=words))
    assert [case.document.index for case in found] == [0, 2, 3]
    assert found[0].document == Document(task="task", index=0, text="a b", instruction="q1")
    assert [case.metric for case in found] == ["rouge_l", "f1", "rouge_l"]
    assert [case.new_tokens for case in found] == [2, 2, 2]
    assert next(accuracy_tasks.from_leval(path, new_tokens=9, count=words)).new_tokens == 3
    path.write_text('{"input": "a"}\n')
    with pytest.raises(ValueError, match="line 1: needs input, instructions and outputs"):
        next(accuracy_tasks.from_leval(path, new_tokens=2, count=words))


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_needle_stands_at_its_depth_once(depth):
    case = accuracy_tasks.needles(depth, 600, 4, seed=1, count=words)
    text, [number] = case.document.text, case.references
    assert case == accuracy_tasks.needles(depth, 600, 4, seed=1, count=words)
    assert text.count("secret number") == 4 and text.count(number) == 1
    before = words(text[: text.index(number)]) / words(text)
    assert before == pytest.approx(depth, abs=0.03)
    city = case.document.instruction.rpartition(" ")[2].rstrip("?")
    assert f"of {city} is {number}." in text and 600 <= words(text) < 650


def test_records_of_a_list_are_all_there_and_evenly():
    case = accuracy_tasks.evidence(0, 400, 5, seed=1, count=words)
    text = case.document.text
    assert len(set(case.references)) == 5
    said = [
        f"account of {name} holds {number} coins"
        for name, number in (right.split(": ") for right in case.references)
    ]
    places = [text.index(one) / len(text) for one in said]
    assert places == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=0.05)
    whole = [
        dict(zip(("name", "coins"), right.split(": "), strict=True)) for right in case.references
    ]
    assert accuracy_scores.records_found(json.dumps(whole), case.references) == 1.0


def case_of(task, index, right):
    document = Document(task=task, index=index, text="", instruction="")
    return accuracy_tasks.Case(document=document, references=(right,), metric="found", new_tokens=1)


def test_tasks_that_full_cannot_do_are_named_and_left_out():
    def texts(full, mine):
        return {"full": {"text": full}, "mine": {"text": mine}}

    answered = [
        (case_of("can", 0, "11"), texts("11", "11")),
        (case_of("can", 1, "12"), texts("12", "no")),
        (case_of("cannot", 0, "13"), texts("no", "13")),
        # What it says holds for either document: it did not read them.
        (case_of("says both", 0, "14"), texts("14 15", "14")),
        (case_of("says both", 1, "15"), texts("14 15", "15")),
    ]
    rows, tasks = accuracy.summary(answered, floor=0.1)
    full, mine = rows
    assert (full["retention"], mine["retention"], mine["tasks"], mine["documents"]) == (
        1,
        0.5,
        1,
        2,
    )
    assert {row["task"]: row["left_out"] for row in tasks} == {
        "can": None,
        "cannot": "full scores 0.000, below 0.1",
        "says both": "full scores 1.000, other documents' answers 1.000",
    }


@pytest.fixture(scope="module")
def lm():
    tiny = tiny_model(max_context=1024, vocab_size=97)
    return dataclasses.replace(tiny, tokenizer=words_tokenizer())


def test_a_quick_run_that_resumes(lm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rouge_score", reason="ROUGE-L needs the bench extra")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(accuracy, "load", lambda name: lm)
    data, out = tmp_path / "list.jsonl", tmp_path / "out.json"
    line = {"input": "w7 w3 w5 " * 100, "instructions": ["w1 w2"], "outputs": ["w3 w4 w5"]}
    short = line | {"input": "w7 w3 w5 " * 10}
    data.write_text(f"{json.dumps(short)}\n{json.dumps(line)}\n", encoding="utf-8")
    call = ["--data", str(data), "--quick", "--configs", "full", "quest:64", "--json", str(out)]
    call += ["--records", str(tmp_path / "records.jsonl"), "--plot", str(tmp_path / "a.png")]
    assert accuracy.main([*call, "--floor", "0"]) == 0
    first = json.loads(out.read_text())
    assert [row["config"] for row in first["rows"]] == ["full", "quest:64"]
    assert {row["task"] for row in first["by_task"]} == {"list", "needles", "evidence"}
    [document, *_] = first["documents"]
    assert (document["task"], document["index"]) == ("list", 1)  # the other is too short
    assert document["tokens"]["full"] <= 3 and document["context"] >= 300
    assert "quest:64" in capsys.readouterr().out
    before = (tmp_path / "records.jsonl").read_text()
    monkeypatch.setattr("bench.accuracy_answers.run_requests", None)
    assert accuracy.main([*call, "--floor", "0"]) == 0
    assert (tmp_path / "records.jsonl").read_text() == before
    assert json.loads(out.read_text())["documents"] == first["documents"]
