"""What an evaluation finds: how far distributions diverge, rows, and a summary of each config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_DRAWS = 10_000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One config on one document, against full attention.

    task, index: of the document; context: tokens of its prompt. tokens: compared, those of full's
    answer before its first stop token. steps: decode steps that they took, in whole chunks.
    kl: KL(full || config) of the next-token distributions in nats, mean over tokens. agreement:
    share of tokens whose best next token is full's too. promoted_pages: host to device in those
    steps. evicted_tokens: dropped for good, summed over KV heads, those of the prompt among them.
    mean_interval: steps between two reranks of an offloaded head; rco: their mean random-corrected
    overlap with the choice before; None where no head is offloaded, or none had a choice.
    device_bytes: keys, values and summaries of a request as long as the prompt; summary_bytes of
    them are summaries. host_bytes: its pages on the host.
    """

    config: str
    task: str
    index: int
    context: int
    tokens: int
    steps: int
    kl: float
    agreement: float
    promoted_pages: int
    evicted_tokens: int
    mean_interval: float | None
    rco: float | None
    device_bytes: int
    summary_bytes: int
    host_bytes: int


@dataclass(frozen=True, kw_only=True)
class ConfigSummary:
    """One config over its documents, each of which weighs the same.

    *_low, *_high: 95 % intervals from resampling documents. ratio: of mean kl to the base config's
    on the documents of both; task_ratios: the same per task; worst_task_ratio: the greatest. All
    None without a base, or where the base does not diverge. tokens: sum over documents.
    promoted_per_step: pages. What else is a mean over documents is as in `Comparison`.
    """

    config: str
    documents: int
    tokens: int
    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    agreement_low: float
    agreement_high: float
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    worst_task_ratio: float | None = None
    task_ratios: dict[str, float] | None = None
    promoted_per_step: float
    evicted_tokens: float
    mean_interval: float | None
    rco: float | None
    context: float
    device_bytes: float
    summary_bytes: float
    host_bytes: float


@dataclass(frozen=True)
class Evaluation:
    """Rows of every document, in the order of the documents, then of the configs."""

    rows: tuple[Comparison, ...]

    def summary(self, base: str | None = None) -> tuple[ConfigSummary, ...]:
        """One row a config, in the order of first appearance.

        base: name of the config whose divergence the others' is divided by.
        Raises ValueError where there are rows, and none of that name.
        """
        names = tuple(dict.fromkeys(row.config for row in self.rows))
        if names and base is not None and base not in names:
            raise ValueError(f"base={base!r} must be None or one of {', '.join(map(repr, names))}")
        under = {(row.task, row.index): row.kl for row in self.rows if row.config == base}
        return tuple(
            _summary([row for row in self.rows if row.config == name], under) for name in names
        )


def compare(full: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per token: whether both have the same best one, and KL(full || other) in nats.

    full, other: logits float32[T, V] -> bool[T], float64[T].
    """
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (full, other))
    return full.argmax(-1) == other.argmax(-1), (np.exp(p) * (p - q)).sum(axis=-1)


def bootstrap_interval(values: Sequence[float], under: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of mean(values) / mean(under), pairs kept together.

    Resampled ten thousand times with a fixed seed. NaN or infinite where `under` can be zero.
    """
    over, below = np.asarray(values, np.float64), np.asarray(under, np.float64)
    draws = np.random.default_rng(0).integers(0, len(over), (_DRAWS, len(over)))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.quantile(over[draws].mean(1) / below[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _summary(rows: Sequence[Comparison], under: dict[tuple[str, int], float]) -> ConfigSummary:
    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in rows]))

    def mean_of_known(name: str) -> float | None:
        known = [getattr(row, name) for row in rows if getattr(row, name) is not None]
        return float(np.mean(known)) if known else None

    ones = [1.0] * len(rows)
    kl_low, kl_high = bootstrap_interval([row.kl for row in rows], ones)
    low, high = bootstrap_interval([row.agreement for row in rows], ones)
    return ConfigSummary(
        config=rows[0].config,
        documents=len(rows),
        tokens=sum(row.tokens for row in rows),
        kl=mean("kl"),
        kl_low=kl_low,
        kl_high=kl_high,
        agreement=mean("agreement"),
        agreement_low=low,
        agreement_high=high,
        promoted_per_step=float(np.mean([row.promoted_pages / row.steps for row in rows])),
        evicted_tokens=mean("evicted_tokens"),
        mean_interval=mean_of_known("mean_interval"),
        rco=mean_of_known("rco"),
        context=mean("context"),
        device_bytes=mean("device_bytes"),
        summary_bytes=mean("summary_bytes"),
        host_bytes=mean("host_bytes"),
        **_ratios(rows, under),
    )


def _ratios(rows: Sequence[Comparison], under: dict[tuple[str, int], float]) -> dict[str, Any]:
    """The ratios of a `ConfigSummary`; nothing where there is nothing to divide by."""
    pairs = [
        (row.task, row.kl, under[row.task, row.index])
        for row in rows
        if (row.task, row.index) in under
    ]
    by_task = {
        task: (
            sum(kl for name, kl, _ in pairs if name == task),
            sum(base for name, _, base in pairs if name == task),
        )
        for task, *_ in pairs
    }
    if not pairs or not all(base > 0 for _, base in by_task.values()):
        return {}
    over, below = [kl for _, kl, _ in pairs], [base for *_, base in pairs]
    low, high = bootstrap_interval(over, below)
    task_ratios = {task: kl / base for task, (kl, base) in by_task.items()}
    return {
        "ratio": float(np.mean(over) / np.mean(below)),
        "ratio_low": low,
        "ratio_high": high,
        "worst_task_ratio": max(task_ratios.values()),
        "task_ratios": task_ratios,
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
