"""Text that streams joins to what the library decodes of the whole, whatever the ids."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexijax.models import tokenizer
from flexijax.models.tokenizer import Tokenizer
from tests.tokenizer_files import KINDS, backend_of, with_added, write

pytestmark = pytest.mark.any_jax


def words_of(kind) -> Tokenizer:
    return Tokenizer(
        backend=with_added(backend_of(kind)),
        bos_token="<s>",
        eos_token="</s>",
        stop_ids=frozenset(),
        chat_template=None,
    )


WORDS = {kind: words_of(kind) for kind in KINDS}


def streamed(words, ids):
    stream = words.stream()
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids(kind, data):
    """Special ones, byte tokens in runs with a byte too many, and ids that no token has."""
    words = WORDS[kind]
    size = words.backend.get_vocab_size()
    one = st.one_of(
        st.integers(0, min(size, 260)), st.integers(0, size + 3), st.integers(size - 5, size)
    )
    # Neighbours, so that runs of one kind of token are as likely as any.
    runs = st.lists(st.tuples(one, st.integers(1, 4)), max_size=30)
    ids = [at for at, count in data.draw(runs) for _ in range(count)]
    whole = words.backend.decode(ids, skip_special_tokens=True)
    assert "".join(streamed(words, ids)) == whole == words.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=60), cut=st.integers(0, 4))
def test_any_text(kind, text, cut):
    words = WORDS[kind]
    ids = words.encode(text)
    ids = ids[: max(0, len(ids) - cut)]  # may end inside a character
    assert "".join(streamed(words, ids)) == words.decode(ids)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=4)), max_size=12))
def test_bytes_of_every_kind(parts):
    """Well-formed and broken UTF-8 side by side, as byte tokens and as byte-level BPE."""
    data = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    for kind in ("llama2", "gemma", "mistral"):
        words = WORDS[kind]
        ids = [words.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
        between = words.backend.token_to_id("▁")
        for some in (ids, [*ids, between, *ids]):
            assert "".join(streamed(words, some)) == words.decode(some)
    words = WORDS["gpt2"]
    from flexijax.models.text_stream import BYTE_OF

    character = {byte: char for char, byte in BYTE_OF.items()}
    ids = [words.backend.token_to_id(character[byte]) for byte in data]
    assert "".join(streamed(words, ids)) == words.decode(ids) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["€", "漢字", "🙂", "a€b🙂c", " é ", "🙂" * 50])
@pytest.mark.parametrize("kind", ["llama2", "mistral", "gemma"])
def test_characters_of_several_byte_tokens_are_whole(kind, text):
    words = WORDS[kind]
    ids = words.encode(text)
    assert any(str(words.backend.id_to_token(i)).startswith("<0x") for i in ids)
    pieces = streamed(words, ids)
    assert "".join(pieces) == words.decode(ids) and "\ufffd" not in "".join(pieces)
    assert "".join(pieces).strip() == text.strip()


def test_text_comes_as_soon_as_it_is_certain():
    """Before the end, that is: a stream that held everything back would join as well."""
    for kind in ("gpt2", "llama2", "unigram", "word_piece", "with_suffix"):
        words = WORDS[kind]
        ids = words.backend.encode("the quick brown fox", add_special_tokens=False).ids
        pieces = streamed(words, ids)
        assert pieces[-1] == "" and sum(bool(piece) for piece in pieces) >= len(ids) - 1, kind
    pieces = streamed(WORDS["replacing_at_the_end"], [70, 71])
    assert pieces[:2] == ["", ""] and pieces[2]


def test_a_long_stream_takes_time_as_its_length():
    """Each push decodes a bounded number of ids, also of broken UTF-8 without end."""
    for kind in ("gpt2", "llama2"):
        words, longest = WORDS[kind], 0

        class Counting:
            def __init__(self, backend):
                self.backend = backend

            def __getattr__(self, name):
                return getattr(self.backend, name)

            def decode(self, ids, **options):
                nonlocal longest
                longest = max(longest, len(ids))
                return self.backend.decode(ids, **options)

        from flexijax.models.text_stream import text_stream

        stream = text_stream(Counting(words.backend), frozenset())
        for _ in range(2000):
            for i in words.encode("the fox") + [
                words.backend.token_to_id("¶" if kind == "gpt2" else "<0xFF>")
            ]:
                stream.push(i)
        assert longest <= 8


def test_a_saved_folder_streams_too(tmp_path):
    write(tmp_path / "m", backend_of("llama2"), {"bos_token": "<s>"})
    words = tokenizer.from_directory(tmp_path / "m")
    assert words is not None
    ids = words.encode("a 🙂 b")
    assert ids[0] == words.backend.token_to_id("<s>")
    assert "".join(streamed(words, ids)) == "a 🙂 b"
