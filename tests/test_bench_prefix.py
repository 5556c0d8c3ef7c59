"""Questions about documents: hits are told from misses, and wrong answers have no numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import prefix
from tests.planted import words_tokenizer
from tests.tiny_models import tiny_model

TOKENS, CHUNK, QUESTION = 1100, 512, 5


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    def prompts(*_, documents, **__):
        draw = np.random.default_rng(0)
        found = []
        for _ in range(documents):
            text = draw.integers(0, 97, TOKENS).tolist()
            found.append([text + draw.integers(0, 97, QUESTION).tolist() for _ in range(3)])
        return found

    monkeypatch.setattr(prefix.flexijax, "load", lambda _: tiny_model(max_context=2048))
    monkeypatch.setattr(prefix, "prompts_of", prompts)
    monkeypatch.setattr(prefix, "use_compilation_cache", lambda: None)
    file = str(tmp_path / "made.json")
    named = ["--policy", "quest", "--documents", "2", "--new-tokens", "3", "--budget-tokens", "64"]
    return ["--data", "none", "--json", file, *named]


def test_hits_are_counted(arguments, capsys):
    assert prefix.main(arguments) == 0
    [row] = json.loads(Path(arguments[3]).read_text())["rows"]
    assert row["hits"] == 4 and row["hit_s"] < row["miss_s"]
    assert row["hit_to_miss"] == row["hit_s"] / row["miss_s"]
    assert row["computed"] == pytest.approx(1 - 2 / 3 * 2 * CHUNK / (TOKENS + QUESTION))
    assert "hit_to_miss" in capsys.readouterr().out


def test_answers_that_differ_have_no_numbers(arguments, monkeypatch, capsys):
    monkeypatch.setattr(prefix, "same", lambda *_: False)
    assert prefix.main(arguments) == 1
    assert capsys.readouterr().out == ""


def test_documents_are_cut_and_counted(tmp_path):
    lm = tiny_model()
    file = tmp_path / "some.jsonl"
    lm = prefix.flexijax.LanguageModel(**{**vars(lm), "tokenizer": words_tokenizer()})
    file.write_text("\n".join(json.dumps({"text": "w1 " * count}) for count in (30, 90, 200)))
    found = prefix.prompts_of(lm, [file], documents=2, shortest=50, longest=100)
    assert len(found) == 2 and len(found[0]) == len(prefix.QUESTIONS)
    assert found[0][0][:90] == found[0][1][:90] and found[1][0][:100] == found[1][1][:100]
    with pytest.raises(ValueError, match="2 documents of 50 tokens, wanted 3"):
        prefix.prompts_of(lm, [file], documents=3, shortest=50, longest=100)
