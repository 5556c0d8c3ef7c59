"""What the tasks read: a needle in generated text, and L-Eval's documents with their questions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PLACES = ("harbour", "mill", "library", "orchard", "station", "quarry", "market", "lighthouse")
_PEOPLE = ("Ada", "Boris", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas")
_DEEDS = ("counted the barrels", "mended a fence", "wrote a long letter", "waited for the rain")
_DEEDS += ("sold two horses", "painted the door", "asked for directions", "read the old maps")
_WORDS_A_TOKEN = 0.8


def filler(draw: random.Random) -> str:
    """A sentence that nobody will be asked about."""
    day, who = draw.randrange(1, 31), draw.choice(_PEOPLE)
    return f"On day {day} {who} {draw.choice(_DEEDS)} near the {draw.choice(_PLACES)}."


def needles(count: int, tokens: int, *, seed: int) -> Iterator[dict[str, Any]]:
    """Documents of about so many tokens, in each a number that is asked for.

    The number stands at evenly spread depths. begin: of a sentence that it ends. choices: it among
    others that stand nowhere.
    """
    draw = random.Random(seed)
    for at in range(count):
        name, place = draw.choice(_PEOPLE), draw.choice(_PLACES)
        number = str(draw.randrange(10_000, 100_000))
        lines: list[str] = []
        while sum(len(line.split()) for line in lines) < tokens * _WORDS_A_TOKEN:
            lines.append(filler(draw))
        depth = at / max(count - 1, 1)
        begin = f"The secret number of {name} at the {place} is"
        lines.insert(round(depth * len(lines)), f"{begin} {number}.")
        question = f"What is the secret number of {name} at the {place}?"
        choices = [number, *(str(draw.randrange(10_000, 100_000)) for _ in range(3))]
        draw.shuffle(choices)
        yield {
            "input": " ".join(lines),
            "question": question,
            "begin": begin,
            "answer": number,
            "choices": choices,
            "depth": depth,
        }


def leval(path: Path) -> Iterator[dict[str, Any]]:
    """The first question of each document of an L-Eval file. Raises ValueError naming the line."""
    for at, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = json.loads(line)
        try:
            question, answer = found["instructions"][0], found["outputs"][0]
            yield {"input": found["input"], "question": question, "answer": answer}
        except (KeyError, IndexError, TypeError) as error:
            message = f"{path}:{at}: needs input, instructions and outputs, as L-Eval has them"
            raise ValueError(message) from error


def write(path: Path, documents: Iterator[dict[str, Any]]) -> int:
    """JSON lines; how many."""
    lines = [json.dumps(one) for one in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
