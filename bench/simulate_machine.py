"""What is simulated: policies as they were compiled, and a model in so much memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from bench import results
from bench.simulate_engine import Asked, SimulatedCore
from bench.simulate_times import Assumptions, load_reports, times_of
from flexijax.aot.footprint import DTYPE, abstract_params, shipped_profile
from flexijax.cache.memory import nbytes
from flexijax.config import CacheConfig
from flexijax.engine.plan_engine import sized_program
from flexijax.engine.program import BOUNDARY_STEPS
from flexijax.models.config import ModelConfig
from flexijax.models.language_model import LanguageModel, from_config
from flexijax.pallas_kernels import platform
from flexijax.profiles.records import Records


@dataclasses.dataclass(frozen=True)
class Counted:
    """One policy: its cache, and the two reports on its programs."""

    name: str
    cache: CacheConfig
    reports: tuple[dict[str, Any], dict[str, Any]]


def counted(paths: Iterable[Path]) -> list[Counted]:
    """The policies of some files of reports, in order of first appearance.

    Raises ValueError unless all are of one model, and each has two reports, of one batch and two
    contexts.
    """
    reports = load_reports(paths)
    if len(models := {one["model"] for one in reports}) > 1:
        raise ValueError(f"the reports are of several models: {', '.join(sorted(models))}")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in reports:
        by_name.setdefault(_name(one), []).append(one)
    return [_one(name, of) for name, of in by_name.items()]


def _name(report: dict[str, Any]) -> str:
    policy, budget = report["cache"]["policy"], report["cache"]["budget_tokens"]
    return policy if policy == "full" else f"{policy}:{budget}"


def _one(name: str, reports: list[dict[str, Any]]) -> Counted:
    contexts = {report["context"] for report in reports}
    batches = {report["batch"] for report in reports}
    if (len(reports), len(contexts), len(batches)) != (2, 2, 1):
        raise ValueError(
            f"{name} has reports of contexts {sorted(contexts)} and batches {sorted(batches)}: "
            "there must be two, of one batch and two contexts"
        )
    said = reports[0]["cache"]
    cache = CacheConfig(policy=said["policy"], budget_tokens=said["budget_tokens"])
    if cache.find_policy().needs_profile:
        profile = shipped_profile(reports[0]["model"], cache.budget_pages)
        cache = dataclasses.replace(cache, profile=profile)
    return Counted(name, cache, (reports[0], reports[1]))


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is simulated: a model in so much memory, under assumptions."""

    config: ModelConfig
    name: str
    device_bytes: float
    host_bytes: float
    assumptions: Assumptions

    @property
    def lm(self) -> LanguageModel:
        """The model without its weights."""
        dtype = jnp.dtype(DTYPE)
        params = abstract_params(self.config)
        return from_config(self.config, params, name=self.name, dtype=dtype, tokenizer=None)

    def run(
        self, of: Counted, asked: Sequence[Asked], *, prefill_first: bool, known: Records
    ) -> dict[str, Any]:
        """All of it to its end: see `SimulatedCore.run`; device_gb: of weights and cache.

        The engine is sized for what is asked as it sizes itself: as many rows as fit. known: what
        was simulated before, by this commit.
        """
        about = [dataclasses.asdict(self.assumptions), self.device_bytes, self.host_bytes]
        key = [results.commit(), of.name, of.reports, about, list(map(repr, asked)), prefill_first]
        found = known.get(*key)
        if found is None:
            with platform.compiling_for("gpu"):
                found = self._run(of, asked, prefill_first)
            known.add(*key, value=found)
        return found

    def _run(self, of: Counted, asked: Sequence[Asked], prefill_first: bool) -> dict[str, Any]:
        lm, longest = self.lm, max(one.prompt_tokens + one.new_tokens for one in asked)
        usual = sum(one.prompt_tokens + one.new_tokens for one in asked) // len(asked)
        weights = nbytes(lm.params)
        program, sizes = sized_program(
            lm,
            of.cache,
            max_context=longest,
            max_requests=len(asked),
            usual_context=usual,
            device_bytes=int(self.assumptions.memory * self.device_bytes) - weights,
            host_bytes=int(self.host_bytes),
            boundary_steps=BOUNDARY_STEPS,
        )
        core = SimulatedCore(
            lm,
            program,
            of.cache,
            times_of(program, self.config, of.reports, self.assumptions),
            boundary=self.assumptions.boundary,
            prefill_first=prefill_first,
        )
        held = {
            "device_gb": (weights + sizes.device_bytes) / 1e9,
            "host_gb": sizes.host_bytes / 1e9,
        }
        return core.run(asked) | held
