"""Which profile a run uses, and where it came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flexijax.models.language_model import LanguageModel
from flexijax.profiles import lookup
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiling.measure import least_tokens, profile_prompt

AUTO = "auto"
# Steps that an unprofiled model is watched for: four windows.
STEPS = 64


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A profile that fits the model, and in words where it came from."""

    profile: HeadProfile
    origin: str


def choose(
    lm: LanguageModel,
    profile: HeadProfile | str | None,
    *,
    page_size: int,
    budget_pages: int,
    prompts: Sequence[Sequence[int]] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Choice:
    """Finds, reads or measures the profile of a run.

    profile: a HeadProfile; the name of a shipped one, or a file; None, the shipped one of the
    model; or "auto", the shipped one where there is one, else one measured on the first of
    `prompts` (token ids) that says something about the choice of `budget_pages`. That reads the
    prompt once more than the run itself will. Where no prompt says anything, every head is called
    unstable: it chooses at every step, which is right whatever the head is like. progress: called
    with (stage, done, total) while measuring.
    Raises ValueError when there is no such profile, or it is of another model.
    """
    choice = _found(lm, profile, budget_pages)
    if choice is None and profile == AUTO:
        if not prompts:
            raise ValueError("profile='auto' measures on a prompt, and here is none")
        choice = _measured(lm, page_size, budget_pages, prompts, progress)
    if choice is None:
        raise ValueError(
            f"profile=None: no profile of {lm.name!r} is shipped; pass profile='auto' to measure "
            "one on the prompt, measure one with `flexijax profile`, pass a HeadProfile, or use "
            "mode='quest' or 'full'"
        )
    choice.profile.check(
        num_layers=lm.attention.num_layers,
        num_kv_heads=lm.attention.num_kv_heads,
        fingerprint=lm.fingerprint,
    )
    return choice


def _found(lm: LanguageModel, profile: HeadProfile | str | None, budget: int) -> Choice | None:
    """What needs no measurement; None where nothing is shipped for the model."""
    if isinstance(profile, HeadProfile):
        return Choice(profile=profile, origin="given by the caller")
    if profile is not None and profile != AUTO:
        kind = "shipped" if profile in lookup.names() else "read from the file"
        return Choice(profile=lookup.load(profile), origin=f"{kind} {profile}")
    shipped = lookup.find(lm, budget)
    if shipped is None:
        return None
    return Choice(
        profile=shipped, origin=f"shipped for {shipped.model} at {shipped.budget_pages} pages"
    )


def _measured(
    lm: LanguageModel,
    page_size: int,
    budget_pages: int,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[str, int, int], None] | None,
) -> Choice:
    needed = least_tokens(page_size=page_size, budget_pages=budget_pages)
    room = lm.max_context - STEPS
    for index, prompt in enumerate(prompts):
        tokens = list(prompt[:room])
        if len(tokens) < needed:
            continue
        stage = f"measuring a profile on prompt {index + 1} of {len(prompts)}"
        found = profile_prompt(
            lm,
            tokens,
            page_size=page_size,
            budget_pages=budget_pages,
            steps=STEPS,
            progress=None if progress is None else partial(progress, stage),
        )
        origin = (
            f"measured on prompt {index + 1} of {len(prompts)}, {len(tokens):,} tokens; "
            f"none of {lm.name} is shipped"
        )
        return Choice(profile=replace(found, source=f"flexijax, {origin}"), origin=origin)
    origin = (
        f"not measured: none of {lm.name} is shipped, and no prompt has {needed} tokens; every "
        "head chooses at every step"
    )
    shape = lm.attention
    return Choice(
        profile=HeadProfile(
            model=lm.name,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            unstable=tuple(
                (layer, head)
                for layer in range(shape.num_layers)
                for head in range(shape.num_kv_heads)
            ),
            page_size=page_size,
            budget_pages=budget_pages,
            source=f"flexijax, {origin}",
            fingerprint=lm.fingerprint,
        ),
        origin=origin,
    )
