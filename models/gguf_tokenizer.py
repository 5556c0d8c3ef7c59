"""Builds the tokenizer that a .gguf file carries in its metadata."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from flexijax.models.backend import failing_as, set_ends
from flexijax.models.files import short
from flexijax.models.tokenizer import Tokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The split before byte-level BPE, by the name in tokenizer.ggml.pre; None is GPT-2's own split.
_SPLITS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_ENDING}",
    "llama3": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_ENDING}",
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_ENDING}",
    "deepseek-r1-qwen": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_ENDING}",
    "tekken": _TEKKEN,
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "tekken")  # a word in the vocabulary is not merged
_ADDS_BOS = ("llama-bpe", "llama3", "tekken")  # where the file does not say
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<|eom_id|>")
_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2


def from_metadata(metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer in a GGUF file's metadata, None where there is none.

    Both kinds of the supported families: "gpt2" (byte-level BPE) and "llama" (SentencePiece BPE).
    ValueError names a kind or split that is unknown, since a near miss would tokenize wrongly.
    """
    meta = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    kind = meta.get("model")
    if kind is None:
        return None
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model={kind!r}: must be 'gpt2' or 'llama'")
    tokens = _texts(meta, "tokens")
    with failing_as("tokenizer.ggml"):
        backend = _byte_level_bpe(meta, tokens) if kind == "gpt2" else _sentencepiece(meta, tokens)
        for token, token_type in zip(tokens, meta.get("token_type") or (), strict=True):
            if token_type in (_CONTROL, _USER_DEFINED):
                special = token_type == _CONTROL
                added = tokenizers.AddedToken(token, special=special, normalized=False)
                (backend.add_special_tokens if special else backend.add_tokens)([added])
    bos, eos, eot = (_token_id(meta, f"{name}_token_id") for name in ("bos", "eos", "eot"))
    default_bos = kind == "llama" or meta.get("pre") in _ADDS_BOS
    add_bos = bos is not None and bool(meta.get("add_bos_token", default_bos))
    add_eos = eos is not None and bool(meta.get("add_eos_token", False))
    set_ends(backend, bos if add_bos else None, eos if add_eos else None)
    stop = {i for i in (eos, eot) if i is not None}
    stop |= {i for name in _END_OF_TURN if (i := backend.token_to_id(name)) is not None}
    names = {"bos": bos, "eos": eos, "unk": _token_id(meta, "unknown_token_id")}
    names["pad"] = _token_id(meta, "padding_token_id")
    return Tokenizer(
        backend=backend,
        bos_token=None if bos is None else tokens[bos],
        eos_token=None if eos is None else tokens[eos],
        stop_ids=frozenset(stop),
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={f"{name}_token": tokens[i] for name, i in names.items() if i is not None},
    )


def _texts(meta: Mapping[str, Any], key: str) -> list[str]:
    values = meta.get(key)
    if values is None:
        raise ValueError(f"tokenizer.ggml.{key} is missing")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"tokenizer.ggml.{key}={short(values)}: must be texts")
    return values


def _token_id(meta: Mapping[str, Any], key: str) -> int | None:
    value = meta.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < len(meta["tokens"])):
        last = len(meta["tokens"]) - 1
        raise ValueError(f"tokenizer.ggml.{key}={short(value)}: must be a token's id, 0..{last}")
    return value


def _byte_level_bpe(meta: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    pre = meta.get("pre", "default")
    if pre not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise ValueError(f"tokenizer.ggml.pre={pre!r}: must be one of {known}")
    merges = []
    for merge in _texts(meta, "merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre in _WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    split = _SPLITS[pre]
    if split is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in ("qwen2", "deepseek-r1-qwen"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE: the best-scored pair merges first, what is left falls back to bytes."""
    if "scores" not in meta:
        raise ValueError("tokenizer.ggml.scores is missing")
    scores: list[float] = meta["scores"]
    if len(scores) != len(tokens) or any(score != score for score in scores):
        raise ValueError(f"tokenizer.ggml.scores: must be {len(tokens)} numbers, one a token")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    parts = dict(_parts(vocabulary))
    merges = [
        (score, tokens[left], tokens[right])
        for token, score in zip(tokens, scores, strict=True)
        for left, right in parts[token]
    ]
    merges.sort(key=lambda merge: -merge[0])
    types = meta.get("token_type") or []
    unknown = meta.get("unknown_token_id", types.index(_UNKNOWN) if _UNKNOWN in types else None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[(left, right) for _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(meta.get("add_space_prefix", True))
    to_mark = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), *to_mark] if prefix else to_mark
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _parts(vocabulary: Mapping[str, int]) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each token with the pairs of ids (left, right) of tokens that it is joined of, in order.

    Tokens that begin another follow from one pass over the sorted vocabulary, and those that end
    it from one over the reversed texts: the work is about the number of characters, where cutting
    every token at every place is the square of its length.
    """
    reversed_ids = {text[::-1]: index for text, index in vocabulary.items()}
    beginning, ending = _longest_beginnings(vocabulary), _longest_beginnings(reversed_ids)
    for token in vocabulary:
        starts = {len(text): vocabulary[text] for text in _chain(token, beginning)}
        ends = ((len(text), reversed_ids[text]) for text in _chain(token[::-1], ending))
        pairs = [(starts.get(len(token) - length), right) for length, right in ends]
        yield token, sorted((left, right) for left, right in pairs if left is not None)


def _longest_beginnings(texts: Iterable[str]) -> dict[str, str]:
    """For each text the longest of the others that it begins with, "" for none.

    "a", "ab", "abc", "b" -> {"a": "", "ab": "a", "abc": "ab", "b": ""}
    """
    found: dict[str, str] = {}
    open_texts: list[str] = []
    for text in sorted(texts):  # what it begins with stands before it, and only such between
        while open_texts and not text.startswith(open_texts[-1]):
            open_texts.pop()
        found[text] = open_texts[-1] if open_texts else ""
        open_texts.append(text)
    return found


def _chain(text: str, beginnings: Mapping[str, str]) -> Iterator[str]:
    while text := beginnings[text]:
        yield text
