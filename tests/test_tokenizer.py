"""Text to ids and back: GGUF and tokenizer.json, chat templates, streaming."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from flexijax.models import gguf_tokenizer, tokenizer
from flexijax.models.tokenizer import Tokenizer

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
