"""A request, and what the engine has made of it so far."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from flexijax.engine.batch import BatchState, SampledTokens
from flexijax.engine.sampling import Sampling, SamplingRows
from flexijax.results import Alternatives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, checked and tokenized. index: its place in the caller's list."""

    index: int
    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_ids: tuple[int, ...]


@dataclasses.dataclass
class Sequence:
    """A request in a row of the batch, and the ids generated so far (stop token included).

    alternatives: of each of those, where the request asks for any, else empty. active: whether it
    goes on generating. error: why it does not, where its tokens mean nothing.
    chunk_steps: decode steps since its last chunk ended.
    """

    request: Request
    row: int
    blocks: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)
    prefill_s: float = 0.0
    decode_s: float = 0.0
    active: bool = False
    error: FloatingPointError | None = None
    chunk_steps: int = 0

    @property
    def held(self) -> int:
        """Tokens in the cache; the one sampled last is not."""
        return len(self.request.tokens) + len(self.tokens) - 1


def enter(
    batch: BatchState, row: int, request: Request, sampling: SamplingRows, token: int, active: bool
) -> None:
    """A request takes a row of a batch of NumPy arrays, its first token sampled.

    sampling: of the request, one row.
    """
    batch.tokens[row] = token
    batch.active[row] = active
    batch.remaining[row] = request.max_new_tokens - 1
    batch.generated[row] = 1
    batch.seeds[row] = request.seed
    batch.stop_ids[row] = -1
    batch.stop_ids[row, : len(request.stop_ids)] = request.stop_ids
    for name in ("temperature", "top_k", "top_p", "min_p"):
        getattr(batch.sampling, name)[row] = getattr(sampling, name)[0]


def not_finite(request: Request, logprobs: list[float]) -> FloatingPointError | None:
    """What is wrong with tokens that were sampled from logits that are no numbers."""
    if all(map(math.isfinite, logprobs)):
        return None
    return FloatingPointError(
        f"prompts[{request.index}]: the model's logits are not finite, so its tokens mean "
        "nothing; load it with dtype='float32', or check its weights"
    )


def add_sampled(sequence: Sequence, sampled: SampledTokens, at: int) -> np.ndarray:
    """Adds what was sampled at place `at` of the rows that ran, and says in which steps: bool[R].

    sampled: on the host.
    """
    emitted = np.asarray(sampled.emitted)[:, at]
    sequence.tokens += np.asarray(sampled.tokens)[emitted, at].tolist()
    logprobs = np.asarray(sampled.logprobs)[emitted, at].tolist()
    sequence.logprobs += logprobs
    sequence.error = not_finite(sequence.request, logprobs)
    most = sequence.request.sampling.alternatives
    if most and sampled.best is not None:
        ids, best = (np.asarray(leaf)[emitted, at, :most].tolist() for leaf in sampled.best)
        sequence.alternatives += [
            tuple(zip(*of, strict=True)) for of in zip(ids, best, strict=True)
        ]
    return emitted
