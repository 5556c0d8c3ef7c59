"""Against transformers: the ids and texts are its own, or the model is not loaded.

Every folder below is read by both; there is no third outcome, in which it loads and differs.
"""

import datetime
import warnings

import pytest

from flexijax.models import tokenizer
from tests.tokenizer_files import (
    KINDS,
    TEXTS,
    added,
    backend_of,
    with_added,
    with_padding,
    write,
)

pytestmark = pytest.mark.any_jax

transformers = pytest.importorskip("transformers", minversion="5.0")

BASE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def theirs(directory, reader=transformers.PreTrainedTokenizerFast):
    """transformers' tokenizer of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reader.from_pretrained(directory)


def ours(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        words = tokenizer.from_directory(directory)
    assert words is not None
    return words


def assert_equal(directory, reader=transformers.PreTrainedTokenizerFast):
    mine, other = ours(directory), theirs(directory, reader)
    for text in TEXTS:
        expected = other(text)["input_ids"]
        bos = [other.bos_token_id]
        if text.startswith("<s>") and expected[:2] == 2 * bos:
            expected = expected[1:]  # the one stated difference: BOS is not doubled
        ids = mine.encode(text)
        assert ids == expected, text
        assert mine.decode(ids) == other.decode(ids, skip_special_tokens=True), text
        bare = other(text, add_special_tokens=False)["input_ids"]
        assert mine.decode(bare) == other.decode(bare, skip_special_tokens=True), text
        stream = mine.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == mine.decode(ids), text
    if type(other) is transformers.PreTrainedTokenizerFast:  # other classes have defaults
        assert dict(mine.special_tokens) == other.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer(kind, tmp_path):
    assert_equal(write(tmp_path / "m", backend_of(kind), BASE))


# The classes that AutoTokenizer takes for a model type build a part of the file anew. For files of
# their own kind it comes out the same, with one exception: LlamaTokenizer takes one of two spaces
# at the beginning of a text where the tokenizer.json of Llama-2, and SentencePiece, keep both.
CLASSES = [
    *[("llama", None, kind) for kind in ("gpt2", "llama3", "llama2", "mistral", "gemma")],
    *[("llama", "PreTrainedTokenizerFast", kind) for kind in ("llama3", "llama2", "mistral")],
    *[("llama", "LlamaTokenizerFast", kind) for kind in ("llama3", "mistral")],
    *[("mistral", "LlamaTokenizer", kind) for kind in ("llama2", "mistral", "llama3")],
    *[(family, "Qwen2Tokenizer", "qwen2") for family in ("qwen2", "qwen3")],
    ("qwen2", "LlamaTokenizerFast", "qwen2"),
    ("llama", "GPT2Tokenizer", "gpt2"),
]


@pytest.mark.parametrize("family, name, kind", CLASSES)
def test_auto_tokenizer(family, name, kind, tmp_path):
    config = BASE | ({} if name is None else {"tokenizer_class": name})
    write(tmp_path / "m", backend_of(kind), config, config={"model_type": family})
    assert_equal(tmp_path / "m", transformers.AutoTokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_padding_and_added_tokens_in_the_file(kind, tmp_path):
    backend = with_padding(with_added(backend_of(kind)))
    assert_equal(write(tmp_path / "m", backend, BASE))


PLACES = {
    "no config at all": (None, {}),
    "one: texts": (BASE, {}),
    "one: objects": (
        {key: added(text) | {"__type": "AddedToken"} for key, text in BASE.items()},
        {},
    ),
    "one: a token the backend lacks": (BASE | {"pad_token": "[PAD]"}, {}),
    "one: a token of the vocabulary that is not special": (BASE | {"eos_token": "the"}, {}),
    "one: null": (BASE | {"bos_token": None, "pad_token": None}, {}),
    "one: a name of its own": (BASE | {"image_token": "<img>", "add_bos_token": True}, {}),
    "two: added_tokens_decoder": (
        BASE
        | {
            "added_tokens_decoder": {
                "0": added("<unk>"),
                "1": added("<s>"),
                "2": added("</s>"),
                "900": added("<|end|>", lstrip=True),
                "901": added("quick", special=False, normalized=True),
            }
        },
        {},
    ),
    "two: additional_special_tokens": (
        BASE | {"additional_special_tokens": ["<|end|>", "[CLS]"]},
        {},
    ),
    "two: extra_special_tokens, a list": (BASE | {"extra_special_tokens": ["<|end|>"]}, {}),
    "two: extra_special_tokens, an object": (
        BASE | {"extra_special_tokens": {"end_token": "<|end|>"}},
        {},
    ),
    "two: special_tokens_map only": ({}, {"special_tokens_map": BASE}),
    "two: special_tokens_map of objects": (
        {},
        {
            "special_tokens_map": {
                key: {k: v for k, v in added(text).items() if k != "special"}
                for key, text in BASE.items()
            }
        },
    ),
    "two: special_tokens_map wins": (
        BASE | {"eos_token": "the"},
        {"special_tokens_map": BASE | {"pad_token": "[PAD]"}},
    ),
    "two: special_tokens_map loses to added_tokens_decoder": (
        BASE | {"added_tokens_decoder": {"1": added("<s>")}},
        {"special_tokens_map": {"eos_token": "the"}},
    ),
    "three: with added_tokens.json": (
        BASE,
        {
            "special_tokens_map": BASE | {"additional_special_tokens": ["<|end|>"]},
            "added_tokens": {"<|end|>": 900, "quick": 901},
        },
    ),
    "three: more of them in special_tokens_map": (
        BASE | {"additional_special_tokens": ["[CLS]"]},
        {
            "special_tokens_map": {"extra_special_tokens": ["<|end|>"], "pad_token": "[PAD]"},
            "added_tokens": {"<|end|>": 900, "[CLS]": 901},
        },
    ),
    "three: both names of one key": (
        BASE | {"additional_special_tokens": ["[CLS]"], "extra_special_tokens": ["[UNK]"]},
        {"special_tokens_map": {"additional_special_tokens": ["<|end|>"]}},
    ),
    "BOS by key, true": (BASE | {"add_bos_token": True}, {}),
    "BOS by key, false": (BASE | {"add_bos_token": False, "add_eos_token": True}, {}),
    "BOS by key, null": (BASE | {"add_bos_token": None}, {}),
    "special tokens split": (BASE | {"split_special_tokens": True}, {}),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "mistral", "gemma", "unigram"])
def test_special_tokens_in_every_place(kind, place, tmp_path):
    config, files = PLACES[place]
    assert_equal(write(tmp_path / "m", backend_of(kind), config, **files))


def test_a_key_that_tokenizer_json_contradicts_is_said(tmp_path):
    write(tmp_path / "m", backend_of("gpt2"), BASE | {"add_bos_token": True})
    with pytest.warns(UserWarning, match="add_bos_token=True, but tokenizer.json does not add"):
        tokenizer.from_directory(tmp_path / "m")


REFUSED = {
    "clean_up_tokenization_spaces": ("unigram", {"clean_up_tokenization_spaces": True}),
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": (
        "gpt2",
        {
            "clean_up_tokenization_spaces": True,
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
        },
    ),
    "fast_tokenizer_files": ("gpt2", {"fast_tokenizer_files": ["tokenizer.4.0.json"]}),
    "bos_token": ("gpt2", {"bos_token": 5}),
    "added_tokens_decoder": ("gpt2", {"added_tokens_decoder": {"x": 5}}),
    "chat_template": ("gpt2", {"chat_template": 5}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_followed_is_refused_by_its_key(key, tmp_path):
    kind, changes = REFUSED[key]
    write(tmp_path / "m", backend_of(kind), BASE | changes)
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {key}"):
        tokenizer.from_directory(tmp_path / "m")


def test_clean_up_does_nothing_to_bpe(tmp_path):
    assert_equal(
        write(tmp_path / "m", backend_of("llama2"), BASE | {"clean_up_tokenization_spaces": True})
    )


MESSAGES = (
    [{"role": "user", "content": "the <b> & 'x' é 🙂"}],
    [
        {"role": "system", "content": "be brief "},
        {"role": "user", "content": "the quick\n", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"f": {"z": 1, "a": [1.5, None]}}]},
        {"role": "tool", "content": '{"a": "é"}'},
        {"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "image"}]},
        {"role": "assistant", "content": "ok", "reasoning": "why"},
        {"role": "user", "content": "end"},
    ],
)
TEMPLATES = {
    "bos written": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "bos left out": "{% for m in messages %}{{ m['role'] + ': ' }}{{ m.content }}\n{% endfor %}",
    "bos later": "\n{{ bos_token }}{{ messages[0]['content'] }}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}"
    "{{ m | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}\n{% endfor %}",
    "generation with dashes": "a {%- generation -%} {{ messages[0].content }} {%- endgeneration %}",
    "tools None": "{{ tools is none }}{{ tools is defined }}{{ documents is none }}"
    "{% if tools %}tools{% endif %}{{ custom_tools is defined }}",
    "special tokens": "{{ unk_token }}{{ pad_token is defined }}{{ cls_token }}{{ image_token }}"
    "{{ mask_token is defined }}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
    "{% if loop.index == 4 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}"
    "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.self }}{{ dict(a=1) | items | list }}",
    "blocks trimmed": "  {% if true %}\n  x\n  {% endif %}\n{{- ' y ' -}}\n z",
    "strings": "{{ messages[0].content.split(' ')[0].strip() }}{{ messages[-1].content | trim }}"
    "{{ 'a<b' | e }}{{ 'x' | upper ~ 1 }}{{ '%s' | format(3) }}{{ '{}'.format('<') }}",
    "macro": "{% macro f(m) -%}<{{ m.role }}>{%- endmacro %}{% for m in messages %}{{ f(m) }}"
    "{% endfor %}",
    "strftime": "{{ strftime_now('%Y-%m-%d') }}{{ strftime_now('%B') }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}"
    "{{ m.reasoning }}"
    "{{ m.name is defined }}{{ m.content is defined }}{% endfor %}",
    "exception": "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}{{ m.role }}{% endfor %}",
    "undefined": "{{ nothing.at_all }}",
    "division": "{{ 1 / 0 }}",
    "underscore": "{% set ns = namespace(_x=1) %}",
    "mutation": "{{ messages.append(1) }}",
    "include": "{% include 'x' %}",
    "syntax": "{% if %}",
    "empty": "",
}


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "llama2", "mistral", "gemma", "unigram"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(kind, name, tmp_path):
    """The text of apply_chat_template, and encoded the very ids; or refused by both."""
    config = BASE | {"chat_template": TEMPLATES[name], "image_token": "<img>", "pad_token": "[PAD]"}
    write(tmp_path / "m", backend_of(kind), config)
    mine, other = ours(tmp_path / "m"), theirs(tmp_path / "m")
    for messages in MESSAGES:
        day = datetime.date.today()
        try:
            text = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            with pytest.raises(ValueError, match="the chat template refused the messages"):
                mine.chat(messages)
            continue
        ids = other.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        if name == "strftime" and datetime.date.today() != day:
            continue  # midnight came between
        prompt = mine.chat(messages)
        assert prompt == text
        assert mine.encode(prompt) == ids["input_ids"]
        more = other(text + "Sure", add_special_tokens=False)["input_ids"]
        assert mine.encode(prompt + "Sure") == more


PLACES_OF_TEMPLATES = {
    "config": (BASE | {"chat_template": "c"}, {}, "c"),
    "list": (
        BASE
        | {
            "chat_template": [
                {"name": "tool_use", "template": "t"},
                {"name": "default", "template": "d"},
            ]
        },
        {},
        "d",
    ),
    "list without a default": (
        BASE | {"chat_template": [{"name": "tool_use", "template": "t"}]},
        {},
        None,
    ),
    "its own file": (BASE | {"chat_template": "c"}, {"chat_template": "file"}, "file"),
    "none": (BASE, {}, None),
    "null": (BASE | {"chat_template": None}, {}, None),
}


@pytest.mark.parametrize("place", PLACES_OF_TEMPLATES)
@pytest.mark.parametrize("more", [False, True])
def test_where_a_template_stands(place, more, tmp_path):
    config, files, expected = PLACES_OF_TEMPLATES[place]
    write(tmp_path / "m", backend_of("gpt2"), config, **files)
    if more:
        write(tmp_path / "m" / "additional_chat_templates", backend_of("gpt2"), None, rag="r")
        expected = expected if place == "its own file" else None
    mine, other = ours(tmp_path / "m"), theirs(tmp_path / "m")
    if expected is None:
        with pytest.raises(ValueError):
            other.apply_chat_template(MESSAGES[0], tokenize=False)
        with pytest.raises(ValueError, match="no chat template"):
            mine.chat(MESSAGES[0])
    else:
        assert mine.chat(MESSAGES[0]) == expected
        assert other.apply_chat_template(MESSAGES[0], tokenize=False) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_alike_by_both(kind, tmp_path):
    """Ours saves a folder that transformers reads as ours did."""
    write(tmp_path / "m", with_added(backend_of(kind)), BASE | {"pad_token": "[PAD]"})
    first = ours(tmp_path / "m")
    (tmp_path / "again").mkdir()
    first.save(tmp_path / "again")
    assert_equal(tmp_path / "again")
    again = ours(tmp_path / "again")
    assert [again.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]
    assert again.special_tokens == first.special_tokens and again.stop_ids == first.stop_ids


ENDS = [
    ({"eos_token_id": [3, 4]}, 5, {3, 4}),
    ({"eos_token_id": 9}, 5, {9}),
    (None, 5, {5}),
    (None, [5, 6], {5, 6}),
]


@pytest.mark.parametrize("generation, config, expected", ENDS)
def test_generation_config_decides_where_a_text_ends(generation, config, expected, tmp_path):
    files = {"config": {"model_type": "llama", "eos_token_id": config}}
    if generation is not None:
        files["generation_config"] = generation
    write(tmp_path / "m", backend_of("gpt2"), BASE, **files)
    assert ours(tmp_path / "m").stop_ids == expected
    reader = transformers.GenerationConfig.from_pretrained
    name = "config.json" if generation is None else None
    other = reader(tmp_path / "m", config_file_name=name, _from_model_config=name is not None)
    ids = other.eos_token_id
    assert set(ids if isinstance(ids, list) else [ids]) == expected
