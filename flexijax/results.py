"""What a generation returns, and what is measured about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.staleness import ProfileFit

# The likeliest tokens in one place, best first: (token id, log-probability).
Alternatives: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one request took; times are wall-clock, compilation left out."""

    prompt_tokens: int
    new_tokens: int
    """Without the stop token."""
    cached_tokens: int
    """Of the prompt, those whose keys and values were in the cache already."""
    queue_s: float
    """From the request's submission until its prompt began to be read, seconds."""
    ttft_s: float
    """From the request's submission to its first token, seconds."""
    tpot_ms: float
    """Decode time per token after the first, milliseconds: of chunks that the request took part in,
    whatever else ran in them; other requests' prompts read in between are not in it."""
    prefill_s: float
    """Reading the prompt, moving it into the cache and sampling the first token, seconds."""
    decode_s: float
    """All decode steps of this request, seconds."""
    longest_gap_s: float
    """The longest time between two times that tokens came, seconds; 0 where they came once."""
    pauses: int
    """How often it had to wait for memory in the middle of its text."""
    compile_s: float
    """What the call spent compiling so far, all requests together, seconds."""
    device_kv_bytes: int
    """Keys, values and summaries of this request on the device at its end."""
    summary_bytes: int
    """Those of `device_kv_bytes` that are summaries of pages."""
    host_kv_bytes: int
    """Its pages in host memory."""
    full_kv_bytes: int
    """What dense keys and values of its length would take on the device."""
    reranks: int
    """Chunks of decode steps after which offloaded heads were looked at."""
    promoted_pages: int
    """Pages that came from the host to the device at reranks."""
    promoted_bytes: int
    offloaded_bytes: int
    """From the device to the host after the prompt."""
    evicted_tokens: int
    """Dropped for good, summed over KV heads, those of the prompt among them."""
    mean_overlap: float | None
    """Share of chosen pages that were already resident, over reranks and offloaded heads; None
    before the first rerank."""
    head_overlap: tuple[tuple[int, int, float], ...] = ()
    """The same for each offloaded head, as (layer, KV head, overlap)."""
    mean_interval: float | None = None
    """Decode steps between two reranks of an offloaded head, mean over heads."""
    head_rco: tuple[tuple[int, int, float], ...] = ()
    """(layer, KV head, mean random-corrected overlap of a choice with the one before), what
    profiles measure; only heads that had a choice."""
    profile: str | None = None
    """In words, where the list of unstable heads came from; None for policies that need none."""
    profile_fit: ProfileFit | None = None
    """How well the profile describes this text; None where it does not tell, was measured with
    other sizes or another score, or too little was observed."""


class StaleProfileWarning(UserWarning):
    """The heads of a text do not behave as the profile says."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request's answer."""

    text: str
    """Empty when the model has no tokenizer."""
    token_ids: tuple[int, ...]
    """Without the stop token."""
    logprobs: tuple[float, ...] | None
    """Of each token, None unless `Sampling.logprobs`."""
    alternatives: tuple[Alternatives, ...] | None = None
    """Of each token's place, None unless `Sampling.alternatives`."""
    finish_reason: str
    """"stop" (a stop token or string) or "length"; of an engine's requests also "cancelled" or
    "deadline"."""
    metrics: Metrics
    profile: HeadProfile | None = None
    """That was used, None for policies that need none."""
