"""Small tokenizers of every kind that published models have, as folders of files."""

import functools
import json
from pathlib import Path

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces ",
    "Hello, world! It's 12345 o'clock.",
    "the<|end|>the <|end|> the",
    "<s>the</s>",
    "</s><s>",
    "tab\tnew\nline\r\n\r\nend",
    "é e\u0301 ﬁ Å",
    "€ 漢字 日本語 한국어 ไทย",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 x",
    "\u200b\ufeff\x00\x7f",
    "\ufffd mid \ufffd",
    "▁lower ▁ one",
    "<0xE2><0x82>",
    "Ġ Ċ",
    "[PAD][UNK][CLS]",
    "def f(x):\n    return x  # comment",
    "the quick brown fox " * 30,
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "it's hello world 123",
    "Hello lower 日本",
]
_SPECIAL = ["<unk>", "<s>", "</s>"]
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _bos(backend: Tokenizer, single: str = "<s> $A") -> None:
    ids = [(text, backend.token_to_id(text)) for text in ("<s>", "</s>") if text in single]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _byte_level(split: str | None, **model) -> Tokenizer:
    backend = Tokenizer(models.BPE(**model))
    if split is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def gpt2() -> Tokenizer:
    return _byte_level(None)


def llama3() -> Tokenizer:
    backend = _byte_level(_LLAMA3, ignore_merges=True)
    _bos(backend)
    assert backend.post_processor is not None
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), backend.post_processor]
    )
    return backend


def qwen2() -> Tokenizer:
    backend = _byte_level(_LLAMA3.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece() -> Tokenizer:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=_SPECIAL + _BYTES, show_progress=False, max_token_length=8
    )
    trained.train_from_iterator([f" {text}" for text in _CORPUS] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    backend = Tokenizer(
        models.BPE(
            vocab=model["vocab"],
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.add_special_tokens(_SPECIAL)
    return backend


def llama2() -> Tokenizer:
    backend = _sentencepiece()
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    _bos(backend)
    return backend


def mistral() -> Tokenizer:
    backend = llama2()
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return backend


def gemma() -> Tokenizer:
    backend = _sentencepiece()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _bos(backend, "<s> $A </s>")
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_CORPUS * 3, trainer)
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=True)
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=_SPECIAL, show_progress=False)
    backend.train_from_iterator(_CORPUS * 3, trainer)
    return backend


def word_level() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        _CORPUS, trainers.WordLevelTrainer(special_tokens=_SPECIAL, show_progress=False)
    )
    return backend


def with_suffix() -> Tokenizer:
    """The oldest BPE, whose words end in "</w>"."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    backend.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=90,
            special_tokens=_SPECIAL,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    return backend


def replacing_at_the_end() -> Tokenizer:
    """A decoder whose last step joins what neighbouring tokens give: nothing is certain early."""
    backend = gpt2()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("the", "THE")])
    return backend


KINDS = {
    kind.__name__: functools.cache(kind)
    for kind in (
        gpt2,
        llama3,
        qwen2,
        llama2,
        mistral,
        gemma,
        unigram,
        word_piece,
        word_level,
        with_suffix,
        replacing_at_the_end,
    )
}


def backend_of(kind: str) -> Tokenizer:
    """A copy, which the caller may change."""
    return tokenizers.Tokenizer.from_str(KINDS[kind]().to_str())


def write(
    directory: Path, backend: Tokenizer, tokenizer_config: dict | None, **files: object
) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and the files NAME.json, or NAME.jinja."""
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    if tokenizer_config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for name, content in files.items():
        if isinstance(content, str):
            (directory / f"{name}.jinja").write_text(content, encoding="utf-8")
        else:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def added(text: str, **flags: bool) -> dict:
    """A token as tokenizer_config.json holds it."""
    whole = dict(lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
    return {"content": text} | whole | flags


def with_padding(backend: Tokenizer) -> Tokenizer:
    backend.enable_truncation(4)
    backend.enable_padding(length=12, pad_token="</s>", pad_id=2)
    return backend


def with_added(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=True, special=True)])
    backend.add_tokens([AddedToken("quick", single_word=True), "[PAD]"])
    return backend
