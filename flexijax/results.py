"""What a generation returns, and what is measured about it."""

from __future__ import annotations

from dataclasses import dataclass

from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.staleness import ProfileFit


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one request took; times in wall-clock seconds or milliseconds, compilation left out.

    ttft_s: from the request's admission to its first token. tpot_ms: per token after the first, as
    the request saw it (other requests' prefills in between included). prefill_s, decode_s: of that.
    compile_s: what the call spent compiling, all requests together.
    device_kv_bytes: keys, values and summaries of this request on the device at its end;
    summary_bytes of them are summaries. host_kv_bytes: its pages on the host. full_kv_bytes: what
    dense KV of its length would take on the device.
    promoted_pages, promoted_bytes: host to device at reranks; offloaded_bytes: device to host.
    evicted_tokens: dropped for good, summed over KV heads, those of the prompt among them.
    reranks: chunks after which stable heads were looked at; mean_interval: decode steps between two
    reranks of a stable head, mean over heads.
    mean_overlap: share of chosen pages that were already resident, over reranks and stable heads;
    None before the first rerank. head_overlap: the same per layer and stable KV head, as
    (layer, head, overlap). head_rco: (layer, head, mean random-corrected overlap of a choice with
    the one before), what profiles measure; only heads that had a choice.
    profile_fit: how well the profile describes this text; None where it does not tell, was measured
    with other sizes or another score, or too little was seen.
    profile: in words, where the list of unstable heads came from; None in modes that need none.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tpot_ms: float
    prefill_s: float
    decode_s: float
    compile_s: float
    device_kv_bytes: int
    summary_bytes: int
    host_kv_bytes: int
    full_kv_bytes: int
    reranks: int
    promoted_pages: int
    promoted_bytes: int
    offloaded_bytes: int
    evicted_tokens: int
    mean_overlap: float | None
    head_overlap: tuple[tuple[int, int, float], ...] = ()
    mean_interval: float | None = None
    head_rco: tuple[tuple[int, int, float], ...] = ()
    profile: str | None = None
    profile_fit: ProfileFit | None = None


class StaleProfileWarning(UserWarning):
    """The heads of a text do not behave as the profile says."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request's answer.

    text: empty when the model has no tokenizer. token_ids: without the stop token. logprobs: of
    each token, None unless `Sampling.logprobs`. finish_reason: "stop" (a stop token or string) or
    "length". profile: that was used, None in modes that need none.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: str
    metrics: Metrics
    profile: HeadProfile | None = None
