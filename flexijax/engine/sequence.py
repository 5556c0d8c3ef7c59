"""A request, and what the engine has made of it so far."""

from __future__ import annotations

import dataclasses

from flexijax.engine.sampling import Sampling


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
    """A request in a slot of the batch, and the ids generated so far (stop token included)."""

    request: Request
    slot: int
    blocks: list[int]
    tokens: list[int]
    logprobs: list[float]
    prefill_s: float
    decode_s: float = 0.0
    active: bool = True

    @property
    def held(self) -> int:
        """Tokens in the cache; the one sampled last is not."""
        return len(self.request.tokens) + len(self.tokens) - 1
