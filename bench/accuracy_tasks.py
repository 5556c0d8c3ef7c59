"""What `bench.accuracy` asks: files in L-Eval's form, needles in a haystack, records of a list."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.harness.data import filler
from flexijax.profiles.documents import Document

NEEDLES, EVIDENCE = "needles", "evidence"
# Of an answer: room for the number in a sentence, and for each record as JSON.
NEEDLE_TOKENS, RECORD_TOKENS = 24, 16
_CITIES = ("Arles", "Bergen", "Cadiz", "Delft", "Essen", "Faro", "Ghent", "Hull", "Izmir", "Jena")
_NAMES = ("Alice", "Bruno", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "James")
_NAMES += ("Karen", "Louis", "Maria", "Nils", "Olga", "Peter", "Quinn", "Rosa", "Simon", "Tina")
_NAMES += ("Ulrich", "Vera", "Walter", "Xenia", "Yusuf", "Zoe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One prompt and how its answer is scored. document: its task, place in it, text, question.

    references: answers that are right; of "records" one "name: number" each. metric: a name of
    `accuracy_scores.METRICS`. new_tokens: of the longest answer. cell: of the needles, what was
    varied.
    """

    document: Document
    references: tuple[str, ...]
    metric: str
    new_tokens: int
    cell: str = ""


def from_leval(path: Path, *, new_tokens: int, count: Callable[[str], int]) -> Iterator[Case]:
    """The first question of each document of a file; a text that came before is left out.

    Each line has `input`, `instructions`, `outputs` and `evaluation`: "f1" is scored by the F1 of
    tokens, all else by ROUGE-L, also those that L-Eval marks "LLM" and "human". new_tokens: of an
    answer at most, and not more than the reference has. count: tokens of a text. Raises ValueError
    naming the line.
    """
    seen: set[str] = set()
    for at, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, asked, right = row["input"], row["instructions"][0], row["outputs"][0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            message = "needs input, instructions and outputs, as L-Eval has them"
            raise ValueError(f"{path}, line {at + 1}: {message}") from error
        if text in seen:
            continue
        seen.add(text)
        yield Case(
            document=Document(task=path.stem, index=at, text=text, instruction=asked),
            references=(right,),
            metric="f1" if row.get("evaluation") == "f1" else "rouge_l",
            new_tokens=max(1, min(new_tokens, count(right))),
        )


def needles(
    depth: float, tokens: int, number: int, *, seed: int, count: Callable[[str], int]
) -> Case:
    """A number that is asked for, among `number` sentences of its kind in generated text.

    depth: where it stands, 0 to 1. tokens: of the text, about. The other sentences stand anywhere.
    """
    draw = random.Random(f"{seed} {depth} {tokens} {number}")
    lines = _haystack(draw, tokens, count)
    cities = draw.sample(_CITIES, number)
    numbers = [str(draw.randrange(10_000, 100_000)) for _ in cities]
    for city, of in list(zip(cities, numbers, strict=True))[1:]:
        lines.insert(draw.randrange(len(lines) + 1), _needle(city, of))
    lines.insert(round(depth * len(lines)), _needle(cities[0], numbers[0]))
    return Case(
        document=Document(
            task=NEEDLES,
            index=draw.randrange(1 << 30),
            text=" ".join(lines),
            instruction=f"What is the secret number of {cities[0]}?",
        ),
        references=(numbers[0],),
        metric="found",
        new_tokens=NEEDLE_TOKENS,
        cell=f"depth {depth:g}, {tokens} tokens, {number} of them",
    )


def evidence(
    index: int, tokens: int, records: int, *, seed: int, count: Callable[[str], int]
) -> Case:
    """Records that stand evenly in a text of about so many tokens; all are asked for, as JSON."""
    draw = random.Random(f"{seed} {index} {tokens} {records}")
    lines = _haystack(draw, tokens, count)
    names = draw.sample(_NAMES, records)
    found = {name: str(draw.randrange(100, 1000)) for name in names}
    for at, (name, number) in reversed(list(enumerate(found.items()))):
        place = round((at + 0.5) / records * len(lines))
        lines.insert(place, f"Record: the account of {name} holds {number} coins.")
    return Case(
        document=Document(
            task=EVIDENCE,
            index=index,
            text=" ".join(lines),
            instruction=(
                f"List the account of every one of the {records} records above, in order, as a "
                'JSON list like [{"name": "Sarah", "coins": 5}, {"name": "Tom", "coins": 7}].'
            ),
        ),
        references=tuple(f"{name}: {number}" for name, number in found.items()),
        metric="records",
        new_tokens=RECORD_TOKENS * records,
        cell=f"{records} records, {tokens} tokens",
    )


def _haystack(draw: random.Random, tokens: int, count: Callable[[str], int]) -> list[str]:
    lines, length = [], 0
    while length < tokens:
        lines.append(filler(draw))
        length += count(lines[-1])
    return lines


def _needle(city: str, number: str) -> str:
    return f"The secret number of {city} is {number}."
