"""The one error of loading, and how everything wrong with a model is collected for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

MAX_PROBLEM = 500  # characters; a hostile file may put megabytes into a name


class LoadError(ValueError):
    """A model that could not be loaded; the message lists every problem found."""

    def __init__(self, source: str, problems: Iterable[str]) -> None:
        self.problems = tuple(_clip(problem) for problem in problems)
        shown = [*self.problems[:40]]
        if len(self.problems) > len(shown):
            shown.append(f"... and {len(self.problems) - len(shown)} more")
        super().__init__(f"cannot load {_clip(source)}:\n" + "\n".join(f"  - {p}" for p in shown))


def _clip(text: str) -> str:
    return text if len(text) <= MAX_PROBLEM else f"{text[: MAX_PROBLEM - 3]}..."


T = TypeVar("T")


def tried(problems: list[str], what: str, read: Callable[[], T]) -> T | None:
    """What `read` returns; where it fails, None, and the reasons are added to problems.

    what: put before a reason that does not say it itself.
    """
    try:
        return read()
    except LoadError as error:
        problems += error.problems
    except ValueError as error:
        problems.append(_clip(f"{what}{error}"))
    except Exception as error:  # a damaged file has values of every wrong kind in every place
        problems.append(_clip(f"{what}damaged: {type(error).__name__}: {error}"))
    return None
