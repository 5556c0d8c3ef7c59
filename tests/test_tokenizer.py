"""Text to ids and back: GGUF and tokenizer.json, chat templates, streaming."""

import dataclasses
import json
import math
import threading
import warnings

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from flexijax.models import gguf_tokenizer, tokenizer
from flexijax.models.backend import failing_as
from flexijax.models.tokenizer import Tokenizer

pytestmark = pytest.mark.any_jax

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CHAT = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('role ' ~ m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_metadata(**changes) -> dict:
    """GGUF metadata of a byte-level BPE whose only merges are "t h" and "th e"."""
    tokens = ["<s>", "<|end|>", *BYTES, "th", "the"]
    meta = {
        "model": "gpt2",
        "pre": "default",
        "tokens": tokens,
        "token_type": [3, 3] + [1] * (len(tokens) - 2),
        "merges": ["t h", "th e"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "add_bos_token": True,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items() if value is not None} | {
        "tokenizer.chat_template": CHAT
    }


def byte_tokenizer(**changes) -> Tokenizer:
    words = gguf_tokenizer.from_metadata(byte_metadata(**changes))
    assert words is not None
    return words


def test_bos_comes_first_once():
    words = byte_tokenizer()
    assert words.encode("the")[0] == 0
    assert words.encode("<s>the") == words.encode("the")
    assert byte_tokenizer(add_bos_token=False).encode("the") == words.encode("the")[1:]
    assert len(words.encode("the")) == 2
    assert words.stop_ids == {1}


def test_what_is_no_unicode_is_refused():
    """Bytes of a command line that are not UTF-8 come as lone surrogates."""
    with pytest.raises(ValueError, match="text is not Unicode: surrogates not allowed at 2"):
        byte_tokenizer().encode("a \udcff")


def test_others_run_while_a_long_text_is_encoded():
    words = byte_tokenizer()
    text = "the <s>é " * 60_000
    ticks, done = [0], threading.Event()

    def tick():
        while not done.wait(0.001):
            ticks[0] += 1

    other = threading.Thread(target=tick)
    other.start()
    before = ticks[0]
    ids = words.encode(text)
    during = ticks[0] - before
    done.set()
    other.join()
    assert during > 10
    assert ids == words.backend.encode(text).ids
    short = text[: len(text) // 60]
    assert ids[: len(words.encode(short))] == words.encode(short)


def test_a_chat_becomes_the_prompt_of_its_template():
    words = byte_tokenizer()
    text = words.chat([{"role": "user", "content": "a < b & c"}])
    assert text == "<|user|>a < b & c<|end|><|assistant|>"
    assert 1 in words.encode(text)
    with pytest.raises(ValueError, match="role tool"):
        words.chat([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match="at least one message"):
        words.chat([])


def test_a_template_cannot_leave_its_sandbox():
    words = byte_tokenizer()
    escaping = Tokenizer(
        backend=words.backend,
        bos_token=None,
        eos_token=None,
        stop_ids=frozenset(),
        chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}",
    )
    with pytest.raises(ValueError, match="unsafe"):
        escaping.chat([{"role": "user", "content": "x"}])


def test_no_template_is_said():
    words = byte_tokenizer()
    bare = Tokenizer(
        backend=words.backend,
        bos_token=None,
        eos_token=None,
        stop_ids=frozenset(),
        chat_template=None,
    )
    with pytest.raises(ValueError, match="no chat template"):
        bare.chat([{"role": "user", "content": "x"}])


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=80), st.integers(0, 3))
def test_a_stream_joins_to_the_text_and_never_shows_half_a_character(text, cut):
    words = byte_tokenizer(add_bos_token=False)
    ids = words.encode(text)
    ids = ids[: max(0, len(ids) - cut)]  # may end inside a character
    stream = words.stream()
    pieces = [stream.push(i) for i in ids]
    whole = words.decode(ids)
    assert "".join([*pieces, stream.flush()]) == whole
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_a_long_stream_equals_decode_with_sentencepiece_spaces():
    words = spm_tokenizer()
    text = " ab a b" * 40
    ids = words.encode(text)
    stream = words.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.flush()]) == words.decode(ids) == text


def spm_tokenizer(**changes) -> Tokenizer:
    """A SentencePiece BPE over a and b with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words = ["▁a", "ab", "▁ab", "b", "a", "▁"]
    meta = {
        "model": "llama",
        "tokens": pieces + words,
        "scores": [0.0] * len(pieces) + [-1.0, -2.0, -3.0, -10.0, -11.0, -12.0],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    } | changes
    built = gguf_tokenizer.from_metadata({f"tokenizer.ggml.{k}": v for k, v in meta.items()})
    assert built is not None
    return built


def test_sentencepiece_merges_the_best_score_first():
    words = spm_tokenizer()
    tokens = [words.backend.id_to_token(i) for i in words.encode("ab b")]
    # "▁ab": the pair ▁+a (-1) beats a+b (-2), then ▁a+b makes ▁ab (-3).
    assert tokens == ["▁ab", "▁", "b"]
    assert words.decode(words.encode("ab é b")) == "ab é b"
    assert spm_tokenizer(add_bos_token=None).add_bos is False


def test_the_split_before_bpe_follows_its_name():
    def parts(pre: str, text: str) -> list[str]:
        splitter = byte_tokenizer(pre=pre).backend.pre_tokenizer
        assert splitter is not None
        return [piece for piece, _ in splitter.pre_tokenize_str(text)]

    assert parts("llama-bpe", "a12345 It's") == ["a", "123", "45", "ĠIt", "'s"]
    assert parts("qwen2", "a12 THEY'LL") == ["a", "1", "2", "ĠTHEY", "'LL"]
    assert parts("smollm", "a12 b") == ["a", "1", "2", "Ġb"]
    assert parts("default", "a12 b") == ["a", "12", "Ġb"]
    assert parts("tekken", "camelCase12") == ["camel", "Case", "1", "2"]


def test_byte_tokens_of_a_gguf_file_are_whole_characters():
    words = spm_tokenizer()
    for text in ("€", "a 漢字 b", "🙂🙂"):
        ids = words.encode(text)
        stream = words.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == words.decode(ids) == text


def test_bos_and_eos_of_a_gguf_file():
    words = spm_tokenizer(add_bos_token=True, add_eos_token=True)
    bare = spm_tokenizer().encode("ab b")
    assert words.encode("ab b") == [1, *bare, 2]
    assert words.encode("") == [1, 2]
    assert words.add_bos and not spm_tokenizer().add_bos
    colon = byte_tokenizer(tokens=["<s:1>", "<|end|>", *BYTES, "th", "the"])
    assert colon.encode("the") == [0, *byte_tokenizer(add_bos_token=False).encode("the")]


def plainly(vocabulary: dict[str, int]) -> dict[str, list[tuple[int, int]]]:
    """The oracle: every token cut at every place."""
    return {
        token: sorted(
            (vocabulary[token[:cut]], vocabulary[token[cut:]])
            for cut in range(1, len(token))
            if token[:cut] in vocabulary and token[cut:] in vocabulary
        )
        for token in vocabulary
    }


@settings(deadline=None, max_examples=300)
@given(st.lists(st.text("ab▁", max_size=7), unique=True, max_size=40))
def test_a_token_is_cut_where_both_parts_are_tokens(tokens):
    vocabulary = {token: index for index, token in enumerate(tokens)}
    assert dict(gguf_tokenizer._parts(vocabulary)) == plainly(vocabulary)


class CountedText(str):
    """Counts the characters that cutting it copies."""

    copied = 0

    def __getitem__(self, at):
        piece = super().__getitem__(at)
        CountedText.copied += len(piece)
        return CountedText(piece)


def test_cutting_a_long_token_is_linear_in_its_length():
    vocabulary = {CountedText("a" * n): n for n in (1, 2, 3, 100_000)}
    CountedText.copied = 0
    parts = dict(gguf_tokenizer._parts(vocabulary))
    assert parts["aaa"] == [(1, 2), (2, 1)] and parts["a" * 100_000] == []
    assert 0 < CountedText.copied < 10 * 100_006  # cutting it everywhere copies 10 ** 10


def test_scores_that_are_no_order_are_refused():
    with pytest.raises(ValueError, match="tokenizer.ggml.scores: must be 265 numbers"):
        spm_tokenizer(scores=[math.nan] * 265)
    with pytest.raises(ValueError, match="tokenizer.ggml.scores: must be 265 numbers"):
        spm_tokenizer(scores=[0.0])


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="tokenizer.ggml.model='t5'"):
        byte_tokenizer(model="t5")
    with pytest.raises(ValueError, match="tokenizer.ggml.pre='viking'"):
        byte_tokenizer(pre="viking")
    with pytest.raises(ValueError, match="merges is missing"):
        byte_tokenizer(merges=None)
    assert gguf_tokenizer.from_metadata({}) is None


def test_save_and_read_back(tmp_path):
    words = byte_tokenizer()
    words.save(tmp_path)
    again = tokenizer.from_directory(tmp_path)
    assert again is not None
    text = "the 12 é <|end|>"
    assert again.encode(text) == words.encode(text)
    assert again.chat([{"role": "user", "content": "x"}]) == words.chat(
        [{"role": "user", "content": "x"}]
    )
    assert again.stop_ids == words.stop_ids


def test_a_hugging_face_directory(tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(BYTES)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|eot|>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", len(BYTES))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "no"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, 301]}))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    words = tokenizer.from_directory(tmp_path)
    assert words is not None
    assert words.add_bos and words.encode("x")[0] == len(BYTES)
    assert words.stop_ids == {300, 301}
    assert words.chat([{"role": "user", "content": "hi"}]) == "<s>hi"
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable tokenizer.json"):
        tokenizer.from_directory(tmp_path)
    assert tokenizer.from_directory(tmp_path / "nowhere") is None


def whole_json() -> dict:
    return json.loads(byte_tokenizer().backend.to_str())


BROKEN = {
    "no JSON": "{",
    "nothing in it": "{}",
    "a list": "[]",
    "no UTF-8": b"\xff",
    "depth": '{"a":' * 100_000,
    "model of a wrong kind": whole_json() | {"model": 5},
    "merge of strangers": whole_json() | {"model": whole_json()["model"] | {"merges": ["x yy"]}},
    "negative ids": whole_json() | {"model": whole_json()["model"] | {"vocab": {"a": -1}}},
    "a regex that is none": whole_json()
    | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}},
    "a processor of strangers": whole_json()
    | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "dropout": whole_json() | {"model": whole_json()["model"] | {"dropout": 0.5}},
    "a charsmap that is none": whole_json()
    | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_tokenizer_json_is_a_value_error_with_its_name(name, tmp_path):
    content = BROKEN[name]
    content = json.dumps(content) if isinstance(content, dict) else content
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.json: ") as caught:
        tokenizer.from_directory(tmp_path)
    assert len(str(caught.value)) < 1000


SPOILT = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def paths(value, at=()):
    """Of everything in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else ()
    items = list(enumerate(value))[:3] if isinstance(value, list) else items
    for key, item in list(items)[:12]:
        yield from paths(item, (*at, key))


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_a_spoilt_file_of_a_folder_loads_or_is_a_value_error(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    files = {
        "tokenizer.json": whole_json(),
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>", "lstrip": False},
            "eos_token": "<|end|>",
            "additional_special_tokens": ["<x>"],
            "chat_template": [{"name": "default", "template": CHAT}],
            "add_bos_token": True,
        },
        "special_tokens_map.json": {"unk_token": "th", "extra_special_tokens": ["<y>"]},
        "added_tokens.json": {"<z>": 300},
        "generation_config.json": {"eos_token_id": [1]},
    }
    name = data.draw(st.sampled_from(sorted(files)))
    place = data.draw(st.sampled_from(list(paths(files[name]))))
    if place:
        *parents, last = place
        node = files[name]
        for key in parents:
            node = node[key]
        node[last] = data.draw(SPOILT)
    else:
        files[name] = data.draw(SPOILT)
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            words = tokenizer.from_directory(folder)
        assert words is not None
        ids = words.encode("the <s> é <|end|>")
        stream = words.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == words.decode(ids)
        words.chat([{"role": "user", "content": "x"}])
    except ValueError as error:
        assert len(str(error)) < 1500


def test_the_prompt_of_a_chat_has_its_template_s_bos_and_no_other():
    messages = [{"role": "user", "content": "the"}]
    body = byte_tokenizer(add_bos_token=False).encode("the")
    for template, expected in (
        ("{{ bos_token }}the", [0, *body]),
        ("the", body),
        ("the{{ bos_token }}", [*body, 0]),
        ("{{ bos_token }}{{ bos_token }}the", [0, 0, *body]),
    ):
        words = dataclasses.replace(byte_tokenizer(), chat_template=template)
        assert words.encode(words.chat(messages)) == expected
    assert words.encode("the") == [0, *body]  # plain text gets it as ever


def test_a_template_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="chat_template=5: must be a text"):
        dataclasses.replace(byte_tokenizer(), chat_template=5)


def test_a_panic_of_the_library_is_a_value_error():
    """pyo3's PanicException is no Exception; Ctrl-C is none either, and passes."""
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(ValueError, match="tokenizer.json: called unwrap"),
        failing_as("tokenizer.json"),
    ):
        raise panic("called unwrap on None" + "x" * 10**6)
    with pytest.raises(KeyboardInterrupt), failing_as("tokenizer.json"):
        raise KeyboardInterrupt
