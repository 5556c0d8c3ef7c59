"""Special tokens of a model's folder: what they are called, and which the vocabulary lacks.

They may stand in tokenizer.json, tokenizer_config.json, special_tokens_map.json and
added_tokens.json at once. They are read here as transformers does (`_from_pretrained` in
tokenization_utils_base.py and `TokenizersBackend`, 5.24).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from flexijax.models.backend import failing_as
from flexijax.models.files import read_json, short

_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMED = tuple(f"{name}_token" for name in _NAMES)
_EXTRA, _OLD_EXTRA = "extra_special_tokens", "additional_special_tokens"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_special_tokens(
    backend: tokenizers.Tokenizer, directory: Path, config: dict[str, Any]
) -> dict[str, str]:
    """Adds the special tokens that the backend lacks; returns those that have a name.

    config: tokenizer_config.json. Returns {"bos_token": "<s>", ...}. ValueError names the key of
    what is no token.
    """
    values = _token_keys(config)
    if not values.get(_EXTRA) and _OLD_EXTRA in values:
        values[_EXTRA] = values[_OLD_EXTRA]
    values.pop(_OLD_EXTRA, None)
    decoder: dict[int, AddedToken] = {}
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        if not isinstance(listed, dict):
            raise ValueError(f"added_tokens_decoder={short(listed)}: must be an object")
        for index, token in listed.items():
            name = f"added_tokens_decoder[{short(index)}]"
            if not index.isdecimal() or not isinstance(token, dict):
                raise ValueError(f"{name}={short(token)}: must be a token by its id")
            decoder[int(index)] = _token(name, token)
    else:
        _add_older_files(values, decoder, directory)
        decoder |= backend.get_added_tokens_decoder()
    named, extra = _named_and_extra(values)
    flags_of = {str(token): token for token in decoder.values()}
    named = {key: flags_of.get(str(token), token) for key, token in named.items()}
    _add(backend, decoder, [*named.values(), *extra], {str(t) for t in named.values()})
    return {key: str(token) for key, token in named.items()}


def _token_keys(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.items()
        if key in (_EXTRA, _OLD_EXTRA) or (key.endswith("_token") and not key.startswith("add_"))
    }


def _named_and_extra(values: dict[str, Any]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    named, extra = {}, []
    for key, value in values.items():
        if value is None:
            continue
        if key != _EXTRA:
            # Keys that are not the usual ones may be anything, and count only as texts.
            if key in _NAMED or isinstance(value, str):
                named[key] = _token(key, value)
        elif isinstance(value, dict):
            named |= {name: _token(f"{key}[{short(name)}]", t) for name, t in value.items()}
        elif isinstance(value, list):
            extra += [_token(f"{key}[{at}]", token) for at, token in enumerate(value)]
        else:
            raise ValueError(f"{key}={short(value)}: must be a list of tokens")
    return named, extra


def _add_older_files(
    values: dict[str, Any], decoder: dict[int, AddedToken], directory: Path
) -> None:
    """Adds what the older files say, which count only without the key added_tokens_decoder."""
    older = _token_keys(read_json(directory / "special_tokens_map.json"))
    late = older.pop(_OLD_EXTRA, None)
    if isinstance(values.get(_EXTRA), list) and isinstance(older.get(_EXTRA), list):
        older[_EXTRA] = values[_EXTRA] + older[_EXTRA]
    values |= older
    usual, extra = _named_and_extra({key: values.get(key) for key in (*_NAMED, _EXTRA)})
    special = {str(token) for token in [*usual.values(), *extra]}
    for text, index in read_json(directory / "added_tokens.json").items():
        if type(index) is not int:
            raise ValueError(f"added_tokens.json: {short(text)}={short(index)}: must be an id")
        is_special = text in special
        decoder[index] = AddedToken(text, normalized=not is_special, special=is_special)
    if _EXTRA not in values:
        values[_EXTRA] = late


def _add(
    backend: tokenizers.Tokenizer,
    decoder: dict[int, AddedToken],
    others: list[AddedToken],
    named: set[str],
) -> None:
    """Adds the tokens in this order; those known already get the flags that are given here."""
    known = {str(token) for token in backend.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(decoder.items())]
    known |= {str(token) for token in new}
    for token in others:
        if str(token) not in known:
            known.add(str(token))
            new.append(token)
    for token in new:
        if str(token) in named:
            token.special = True
    with failing_as("special tokens"):
        backend.add_tokens(new)


def _token(name: str, value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{name}={short(value)}: must be a text or an object with a content")
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    wrong = next((flag for flag, on in flags.items() if not isinstance(on, bool)), None)
    if wrong is not None:
        raise ValueError(f"{name}: {wrong}={short(flags[wrong])}: must be true or false")
    return AddedToken(value["content"], **flags)
