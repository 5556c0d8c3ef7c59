"""Kinds of fields of requests: what is checked by hand, and what is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError, core_schema

MAX_PROMPTS, MAX_STOPS, MAX_STOP_LENGTH = 128, 16, 256
# Ids of the largest vocabularies have six digits.
_MAX_ID = 2**31 - 1
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}


class Body(BaseModel):
    """A request. A field that is not known is refused, never ignored, and so is a wrong type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _refuse(message: str) -> PydanticCustomError:
    # Braces would be read as places for values.
    return PydanticCustomError("value", "{message}", {"message": message})


class Checked:
    """Annotates a field whose values a function checks, with the schema that says which it takes.

    check: raises what pydantic understands, or returns the field's value.
    """

    def __init__(self, check: Callable[[Any], Any], schema: dict[str, Any]) -> None:
        self._check, self._schema = check, schema

    def __get_pydantic_core_schema__(self, *_: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, *_: Any) -> dict[str, Any]:
        return self._schema


def only(why: str, *neutral: Any) -> Checked:
    """Of a field that may be left out, null, or one of the values that change nothing."""

    def check(value: Any) -> None:
        # True is no 1 here, but 1.0 is.
        same = (one for one in neutral if isinstance(value, bool) == isinstance(one, bool))
        if value is None or value in same:
            return None
        raise _refuse(why)

    return Checked(check, {"enum": [None, *neutral]})


def _is_ids(value: Any) -> bool:
    return all(type(one) is int and 0 <= one <= _MAX_ID for one in value)


def _text(value: Any) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _refuse(f"is not Unicode: {error.reason} at {error.start}") from None
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """One or more texts, or lists of token ids."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value:
        if _is_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise _refuse(f"has {len(value)} prompts, at most {MAX_PROMPTS} go together")
        if all(isinstance(one, str) and one for one in value):
            return [_text(one) for one in value]
        if all(isinstance(one, list) and one and _is_ids(one) for one in value):
            return value
    raise _refuse(
        "must be a text, a list of token ids, or a list of either, and none of them empty"
    )


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
        raise _refuse("must be a text or a list of texts, and none of them empty")
    if len(given) > MAX_STOPS or any(len(one) > MAX_STOP_LENGTH for one in given):
        raise _refuse(f"has more than {MAX_STOPS} texts, or one of over {MAX_STOP_LENGTH} letters")
    return tuple(_text(one) for one in given)


def _content(value: Any) -> str:
    """The text of a message, whose parts are joined."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.keys() != {"type", "text"}:
                raise _refuse('has a part that is not {"type": "text", "text": ...}')
            if part["type"] != "text" or not isinstance(part["text"], str):
                raise _refuse("has a part that is no text: this server reads text alone")
        return "".join(_text(part["text"]) for part in value)
    raise _refuse("must be a text, or a list of parts that are texts")


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_SOME = {"minItems": 1, "maxItems": MAX_PROMPTS}
_STOP = _TEXT | {"maxLength": MAX_STOP_LENGTH}

_MANY = [{"type": "array", "items": items} | _SOME for items in (_TEXT, _IDS)]
Prompts: TypeAlias = Annotated[
    list[str | list[int]], Checked(_prompts, {"anyOf": [_TEXT, _IDS, *_MANY]})
]
_STOPS = {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}
Stops: TypeAlias = Annotated[
    tuple[str, ...], Checked(_stops, {"anyOf": [_STOP, _STOPS, {"type": "null"}]})
]
_PARTS = {"type": "array", "items": _PART}
Content: TypeAlias = Annotated[str, Checked(_content, {"anyOf": [{"type": "string"}, _PARTS]})]
