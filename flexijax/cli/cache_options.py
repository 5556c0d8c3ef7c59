"""The options of the commands that run a cache, and the configuration that they make."""

from __future__ import annotations

import argparse
import dataclasses

from flexijax import policies
from flexijax.config import ADAPTIVE, TRANSFERS, CacheConfig
from flexijax.pallas_kernels.implementations import IMPLEMENTATIONS
from flexijax.policies.base import Policy
from flexijax.policies.codec import CODECS
from flexijax.policies.page_scores import SCORES
from flexijax.profiles.head_profile import HeadProfile


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """--policy, --budget-tokens and what else a `CacheConfig` holds, in a group of their own."""
    add, default = parser.add_argument_group("cache").add_argument, CacheConfig()
    add(
        "--policy",
        choices=policies.names(),
        default=default.policy,
        metavar="NAME",
        help="see `flexijax policies` (%(default)s)",
    )
    for option, value, meaning in (
        ("--budget-tokens", default.budget_tokens, "that a head attends to"),
        ("--page-size", default.page_size, "tokens kept or moved together"),
    ):
        add(option, type=int, default=value, metavar="N", help=f"{meaning} (%(default)s)")
    add(
        "--rerank-interval",
        type=interval,
        default=default.rerank_interval,
        metavar="N",
        help="steps between two reranks, or adaptive (%(default)s)",
    )
    add("--score", choices=tuple(SCORES), help="of pages, where the policy scores them (sketch2)")
    for option, pages in (
        ("--device-codec", "full pages on the device"),
        ("--host-codec", "pages on the host"),
    ):
        add(option, choices=tuple(CODECS), help=f"{pages} in fewer bits (the model's dtype)")
    add("--implementation", choices=IMPLEMENTATIONS)
    add("--transfer", choices=TRANSFERS)


def cache_config(
    args: argparse.Namespace,
    *,
    profile: HeadProfile | str | None = None,
    dtype: str | None = None,
) -> CacheConfig:
    """What the options ask for. Raises ValueError naming what does not go together."""
    return CacheConfig(
        policy=_policy(args.policy, args.score),
        page_size=args.page_size,
        budget_tokens=args.budget_tokens,
        rerank_interval=args.rerank_interval,
        profile=profile,
        dtype=dtype,
        device_codec=args.device_codec,
        host_codec=args.host_codec,
        implementation=args.implementation,
        transfer=args.transfer,
    )


def _policy(name: str, score: str | None) -> str | Policy:
    if score is None:
        return name
    policy = policies.find(name)
    if not any(field.name == "score" for field in dataclasses.fields(policy)):  # pyright: ignore
        raise ValueError(f"--score={score}: policy {name} scores no pages")
    return dataclasses.replace(policy, score=SCORES[score])  # pyright: ignore


def interval(text: str) -> int | str:
    """A number of steps, or "adaptive"."""
    return text if text == ADAPTIVE else int(text)
