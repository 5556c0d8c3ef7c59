"""Measures on real text which KV heads of a model are unstable."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexijax.models.language_model import LanguageModel
from flexijax.profiles.documents import Document, Tokenizer, prompt_ids
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.records import Records
from flexijax.profiling.profile import make_profile
from flexijax.profiling.record import RecordedChoices, record
from flexijax.profiling.settings import Settings
from flexijax.profiling.statistics import DocumentRecord, from_json, statistics, to_json

# A prompt must hold this many times the budget before its heads are told apart. The 22 heads of
# SmolLM2 found on one document share 0.59 to 1.00 with those found on the other tasks, 0.86 on
# average of ten (chance: 0.24). By RCO it was 0.45 to 0.95, and no less at 1.5 times the budget,
# the least measured, than at 10 times.
CHOICE = 1.5
# Raise it when what is kept of a document changes: records of another version are measured again.
_VERSION = 2


def measure_documents(
    lm: LanguageModel,
    documents: Sequence[Document],
    settings: Settings,
    *,
    records: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[DocumentRecord]:
    """Records every document and keeps its statistics; memory does not grow with their number.

    records: a file to which each finished document is added as a JSON line; documents that it
    already holds, of the same model, text and settings, are not measured again. progress: called
    with (documents done, of how many, what is at hand). Raises ValueError when the model has no
    tokenizer, or, before anything is measured, where the documents of a task are too short for any
    head to have a choice.
    """
    tokenizer = _tokenizer(lm)
    prompts = [prompt_ids(d, tokenizer, max_tokens=settings.max_tokens) for d in documents]
    _check_lengths(documents, prompts, settings)
    # What is made of the statistics later on changes none of them.
    later = ("fraction", "unstable_by")
    measured_by = {name: value for name, value in asdict(settings).items() if name not in later}
    known, result = Records(records), []
    for done, (document, tokens) in enumerate(zip(documents, prompts, strict=True)):
        key: list[Any] = [_VERSION, lm.fingerprint, lm.name, measured_by]
        key += [document.task, document.text, document.instruction]
        if progress is not None:
            progress(done, len(documents), f"{document.task}[{document.index}]")
        found = known.get(*key)
        if found is None:
            found = to_json(measure_prompt(lm, tokens, settings, document=document))
            known.add(*key, value=found)
        # The result is always what the file says, so that resuming changes no digit.
        result.append(from_json(found))
    if progress is not None:
        progress(len(documents), len(documents), "done")
    return result


def measure_prompt(
    lm: LanguageModel,
    tokens: list[int],
    settings: Settings,
    *,
    document: Document | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DocumentRecord:
    """Records one prompt of token ids; document only names it in the result.

    progress: called with (tokens done, of how many).
    """
    recording = record_prompt(lm, tokens, settings, progress=progress)
    return reduced(recording, len(tokens), settings, document=document)


def record_prompt(
    lm: LanguageModel,
    tokens: list[int],
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> RecordedChoices:
    """What the heads choose after a prompt; those of one `max_tokens` share one compilation."""
    return record(
        lm,
        tokens,
        steps=settings.steps,
        page_size=settings.page_size,
        budgets=settings.budgets,
        capacity=max(len(tokens), min(settings.max_tokens, lm.max_context - settings.steps))
        + settings.steps,
        score=settings.score,
        progress=progress,
    )


def reduced(
    recording: RecordedChoices, tokens: int, settings: Settings, *, document: Document | None = None
) -> DocumentRecord:
    """The statistics of a recording of a prompt of `tokens` tokens."""
    return DocumentRecord(
        task=document.task if document is not None else "prompt",
        index=document.index if document is not None else 0,
        tokens=tokens,
        pages=float(recording.pages.mean()),
        at_budget=statistics(recording, settings),
    )


def min_tokens(*, page_size: int, budget_pages: int) -> int:
    """The fewest tokens of a prompt that says something about the choice of `budget_pages`."""
    return math.ceil(CHOICE * budget_pages) * page_size


def profile_prompt(
    lm: LanguageModel,
    tokens: list[int],
    *,
    page_size: int,
    budget_pages: int,
    steps: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> HeadProfile:
    """A profile from nothing but one prompt, for a model that nobody has profiled.

    tokens: the prompt's ids, at least `min_tokens` of them, with room for `steps` more in the
    model's context. progress: called with (tokens done, of how many). Raises ValueError when they
    are too few to say anything.
    """
    least = min_tokens(page_size=page_size, budget_pages=budget_pages)
    if len(tokens) < least:
        raise ValueError(
            f"a prompt of {len(tokens)} tokens says nothing about the choice of {budget_pages} "
            f"pages of {page_size} tokens; it must have at least {least}"
        )
    settings = Settings(
        page_size=page_size, budgets=(budget_pages,), steps=steps, max_tokens=len(tokens)
    )
    entry = measure_prompt(lm, tokens, settings, progress=progress)
    return make_profile(lm, [entry], settings, budget=budget_pages)


def _check_lengths(
    documents: Sequence[Document], prompts: Sequence[Sequence[int]], settings: Settings
) -> None:
    longest: dict[str, int] = {}
    for document, prompt in zip(documents, prompts, strict=True):
        longest[document.task] = max(longest.get(document.task, 0), len(prompt))
    budget = settings.budgets[-1] * settings.page_size
    for task, tokens in longest.items():
        if tokens + settings.steps <= budget:
            raise ValueError(
                f"the longest prompt of {task} has {tokens} tokens, and with steps="
                f"{settings.steps} no more than the budget of {budget}: every page is chosen, and "
                "nothing is learned; give longer documents, or a smaller budget"
            )


def _tokenizer(lm: LanguageModel) -> Tokenizer:
    if lm.tokenizer is None:
        raise ValueError(f"{lm.name} has no tokenizer, so it cannot read documents")
    return lm.tokenizer
