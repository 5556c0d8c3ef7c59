"""Which profile a run uses, and where it came from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from flexijax.config import CacheConfig
from flexijax.engine.plan import find_profile, origin_of
from flexijax.models.language_model import LanguageModel
from flexijax.profiles import lookup
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiling.measure import min_tokens, profile_prompt

AUTO = "auto"
# Steps that an unprofiled model is watched for: four windows.
STEPS = 64


@dataclass(frozen=True, kw_only=True)
class ProfileChoice:
    """A profile that fits the model, and in words where it came from."""

    profile: HeadProfile
    origin: str


def with_profile(
    lm: LanguageModel,
    cache: CacheConfig,
    *,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[CacheConfig, ProfileChoice | None]:
    """The configuration with the profile that it asks for, and the choice; arguments of `choose`.

    (cache, None) for policies that need no profile.
    """
    if not cache.find_policy().needs_profile:
        return cache, None
    choice = choose(lm, cache, prompts=prompts, progress=progress)
    return replace(cache, profile=choice.profile), choice


def choose(
    lm: LanguageModel,
    cache: CacheConfig,
    *,
    prompts: Sequence[Sequence[int]] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> ProfileChoice:
    """Finds, reads or measures the profile that `cache.profile` asks for.

    "auto" is the shipped one where there is one, else one measured on the first of `prompts` (token
    ids) that says something about the choice of `cache.budget_pages`. That reads the prompt once
    more than the run itself will. Where no prompt says anything, every head is called unstable: it
    chooses at every step, which is right whatever the head is like. progress: called with (stage,
    done, total) while measuring.
    Raises ValueError when there is no such profile, or it is of another model.
    """
    asked = cache.profile
    if asked == AUTO:
        if lookup.find(lm, cache.budget_pages) is None:
            if not prompts:
                raise ValueError("profile='auto' measures on a prompt, and here is none")
            return _measured(lm, cache.page_size, cache.budget_pages, prompts, progress)
        cache = replace(cache, profile=None)
    found = find_profile(lm, cache)
    return ProfileChoice(profile=found, origin=origin_of(asked, found))


def _measured(
    lm: LanguageModel,
    page_size: int,
    budget_pages: int,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[str, int, int], None] | None,
) -> ProfileChoice:
    needed = min_tokens(page_size=page_size, budget_pages=budget_pages)
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
        return ProfileChoice(profile=replace(found, source=f"flexijax, {origin}"), origin=origin)
    origin = (
        f"not measured: none of {lm.name} is shipped, and no prompt has {needed} tokens; every "
        "head chooses at every step"
    )
    shape = lm.attention
    return ProfileChoice(
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
