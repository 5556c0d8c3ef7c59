"""Builds the tokenizer that a .gguf file carries in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

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
    if not meta.get("tokens"):
        raise ValueError("tokenizer.ggml.tokens is missing")
    tokens: list[str] = meta["tokens"]
    backend = _byte_level_bpe(meta, tokens) if kind == "gpt2" else _sentencepiece(meta, tokens)
    for token, token_type in zip(tokens, meta.get("token_type") or (), strict=True):
        if token_type in (_CONTROL, _USER_DEFINED):
            special = token_type == _CONTROL
            added = tokenizers.AddedToken(token, special=special, normalized=False)
            (backend.add_special_tokens if special else backend.add_tokens)([added])

    def text(key: str) -> str | None:
        token_id = meta.get(key)
        return None if token_id is None else tokens[token_id]

    default_bos = kind == "llama" or meta.get("pre") in _ADDS_BOS
    bos = text("bos_token_id")
    stop = {meta[key] for key in ("eos_token_id", "eot_token_id") if meta.get(key) is not None}
    stop |= {i for name in _END_OF_TURN if (i := backend.token_to_id(name)) is not None}
    return Tokenizer(
        backend=backend,
        bos_token=bos,
        eos_token=text("eos_token_id"),
        add_bos=bos is not None and bool(meta.get("add_bos_token", default_bos)),
        stop_ids=frozenset(int(i) for i in stop),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _byte_level_bpe(meta: Mapping[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    pre = meta.get("pre", "default")
    if pre not in _SPLITS:
        known = ", ".join(_SPLITS)
        raise ValueError(f"tokenizer.ggml.pre={pre!r}: must be one of {known}")
    if "merges" not in meta:
        raise ValueError("tokenizer.ggml.merges is missing")
    merges = []
    for merge in meta["merges"]:
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
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score in zip(tokens, scores, strict=True):
        pairs = []
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                pairs.append((left, right))
        merges += [(score, tokens[left], tokens[right]) for left, right in sorted(pairs)]
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
