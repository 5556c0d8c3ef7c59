"""Law 8: bad input is refused, by name, before anything is traced."""

import dataclasses
import math

import numpy as np
import pytest

import flexijax
from flexijax.engine import plan
from flexijax.engine.jit_cache import num_compiled
from flexijax.policies.base import HeadGroup, Policy, Tier
from flexijax.policies.minmax import MinMax
from flexijax.policies.quest import Quest
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def profile_of(layers):
    return flexijax.HeadProfile(
        model="another",
        num_layers=layers,
        num_kv_heads=2,
        unstable=(),
        page_size=16,
        budget_pages=4,
        source="by hand",
    )


@dataclasses.dataclass(frozen=True)
class Heads(Policy):
    """Keeps the named heads densely, whether the model has them or not."""

    heads: tuple[int, ...]

    def groups(self, layer, run):
        return (HeadGroup(self.heads, (Tier(None),)),)


BAD_CALLS = {
    "empty prompt": (dict(prompts=[[1], []]), r"prompts\[1\] is empty"),
    "text without tokenizer": (dict(prompts="hello"), r"prompts\[0\] is text"),
    "too long": (dict(prompts=[[1] * 500]), r"prompts\[0\] has 500 tokens.*512"),
    "token of no vocabulary": (dict(prompts=[[1, 97]]), r"prompts\[0\] holds token 97.*0\.\.96"),
    "negative token": (dict(prompts=[[-1]]), r"prompts\[0\] holds token -1"),
    "no new tokens": (dict(max_new_tokens=0), "max_new_tokens=0"),
    "negative new tokens": (dict(max_new_tokens=-3), "max_new_tokens=-3"),
    "bool new tokens": (dict(max_new_tokens=True), "max_new_tokens=True"),
    "float new tokens": (dict(max_new_tokens=2.0), r"max_new_tokens=2\.0"),
    "prompts that are none": (dict(prompts=None), "prompts=None must be a list"),
    "a number of prompts": (dict(prompts=5), "prompts=5 must be a list"),
    "a policy for a cache": (dict(cache="full"), "cache='full' must be None or a"),
    "a word for a sampling": (dict(sampling="greedy"), "sampling='greedy' must be a Sampling"),
    "words for samplings": (dict(sampling=["greedy"]), r"sampling=\['greedy'\] must be"),
    "stop token of no vocabulary": (
        dict(sampling=flexijax.Sampling(stop_ids=(2**40,))),
        r"stop_ids holds token 1099511627776, not in 0\.\.96",
    ),
    "too many stop tokens": (
        dict(sampling=flexijax.Sampling(stop_ids=tuple(range(17)))),
        "stop_ids has 17 tokens, at most 16",
    ),
    "kernels of a GPU": (
        dict(cache=flexijax.CacheConfig(implementation="triton")),
        "implementation='triton' runs on NVIDIA GPUs only",
    ),
    "an interval without an end": (
        dict(cache=flexijax.CacheConfig(rerank_interval=10**14)),
        "rerank_interval=100000000000000 is longer than the 512 tokens",
    ),
    "movers of a GPU": (
        dict(cache=flexijax.CacheConfig(transfer="zero_copy")),
        "transfer='zero_copy' runs on NVIDIA GPUs only",
    ),
    "no batch": (dict(max_batch=0), "max_batch=0"),
    "bool batch": (dict(max_batch=True), "max_batch=True"),
    "float batch": (dict(max_batch=1.5), r"max_batch=1\.5"),
    "foreign profile": (
        dict(cache=flexijax.CacheConfig(profile=profile_of(3))),
        "num_layers is 3 in the profile and 2",
    ),
    "no profile": (dict(cache=flexijax.CacheConfig(profile=None)), "profile=None"),
    "a budget that the prompt's window fills": (
        dict(cache=flexijax.CacheConfig(policy="snapkv", budget_tokens=64)),
        "budget_tokens=64 must be more than window=64 of policy='snapkv'",
    ),
    "a policy that forgets a head": (
        dict(cache=flexijax.CacheConfig(policy=Heads((0,)))),
        r"head groups of layer 0 name heads \[0\]; each of 0 \.\. 1 must",
    ),
    "a policy of a head too many": (
        dict(cache=flexijax.CacheConfig(policy=Heads((0, 1, 2)))),
        r"head groups of layer 0 name heads \[0, 1, 2\]",
    ),
    "summaries that end before the keys": (
        dict(cache=flexijax.CacheConfig(policy=Quest(MinMax("float16")))),
        "dtype='float16' end at 65504, and keys in float32 do not",
    ),
    "codes for what attends to everything": (
        dict(cache=flexijax.CacheConfig(policy="full", device_codec="int4")),
        "device_codec='int4': policy='full' keeps heads of layer 0 dense; pages are coded where",
    ),
    "codes for what drops tokens": (
        dict(cache=flexijax.CacheConfig(policy="h2o", device_codec="int8")),
        "device_codec='int8': policy='h2o' keeps heads of layer 0 evicting",
    ),
    "codes for a host that has nothing": (
        dict(cache=flexijax.CacheConfig(policy="quest", host_codec="int8")),
        "host_codec='int8': policy='quest' keeps no pages there",
    ),
    "codes for heads of which none chooses": (
        dict(cache=flexijax.CacheConfig(profile=profile_of(2), device_codec="int8")),
        "device_codec='int8': policy='flexi' keeps no pages there",
    ),
    "fewer samplings": (dict(sampling=[]), "sampling has 0 entries for 1 prompts"),
    "flat ids": (dict(prompts=[1, 2, 3]), r"prompts\[0\]=1 must be"),
    "fractional token": (dict(prompts=[[1.5]]), r"prompts\[0\]=\[1\.5\] must be"),
    "stop without tokenizer": (dict(sampling=flexijax.Sampling(stop=("x",))), "stop="),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_before_any_tracing(name, lm):
    changes, message = BAD_CALLS[name]
    cache = flexijax.CacheConfig(profile=profile_of(2))
    call = dict(prompts=[[1, 2]], max_new_tokens=20, cache=cache) | changes
    before = num_compiled()
    with pytest.raises(ValueError, match=message):
        flexijax.generate(lm, call.pop("prompts"), **call)
    assert num_compiled() == before


def test_a_name_is_no_model():
    with pytest.raises(ValueError, match="lm='smollm2' must be a LanguageModel"):
        flexijax.generate("smollm2", ["hello"], max_new_tokens=2)


def test_more_than_the_memory_is_refused_before_any_tracing(lm, monkeypatch):
    monkeypatch.setattr(plan, "available_bytes", lambda: (10_000, 10_000))
    cache = flexijax.CacheConfig(profile=profile_of(2))
    before = num_compiled()
    with pytest.raises(ValueError, match=r"66 tokens of context need .* GB on the device \(free: "):
        flexijax.generate(lm, [[1, 2]], max_new_tokens=64, cache=cache)
    assert num_compiled() == before


BAD_CONFIGS = (
    (dict(policy="dense"), "policy='dense' must be one of .*'flexi', 'full'.* or a Policy object"),
    (dict(policy=Quest), "policy=<class .*Quest'> must be a name or a Policy object"),
    (dict(profile=3), "profile=3 must be None, a name or a HeadProfile"),
    (dict(page_size=0), "page_size=0"),
    (dict(page_size=-16), "page_size=-16"),
    (dict(page_size=True), "page_size=True"),
    (dict(page_size=12), "page_size=12"),
    (dict(budget_tokens=0), "budget_tokens=0"),
    (dict(budget_tokens=100), "budget_tokens=100 must be a multiple of page_size=16.* 96 or 112"),
    (dict(budget_tokens=16), "budget_tokens=16 must be at least 2 pages"),
    (dict(rerank_interval=-1), "rerank_interval=-1"),
    (dict(rerank_interval=2.0), r"rerank_interval=2\.0"),
    (dict(dtype="int4"), "dtype='int4'"),
    (dict(implementation="cuda"), "implementation='cuda'"),
    (dict(transfer="dma"), "transfer='dma'"),
    (dict(device_codec="int2"), "device_codec='int2' must be None or one of 'int8', 'int4'"),
    (dict(host_codec=4), "host_codec=4 must be None or one of 'int8', 'int4'"),
    (
        dict(device_codec="int4", implementation="pallas"),
        "device_codec='int4' has no kernels but XLA's: leave implementation='pallas' at None",
    ),
)
BAD_SAMPLINGS = (
    (dict(temperature=math.nan), "temperature=nan"),
    (dict(temperature=-1.0), r"temperature=-1\.0"),
    (dict(temperature=True), "temperature=True"),
    (dict(top_k=0), "top_k=0"),
    (dict(top_p=math.nan), "top_p=nan"),
    (dict(min_p=2.0), r"min_p=2\.0"),
    (dict(stop=("",)), "stop="),
    (dict(stop_ids=(-1,)), "stop_ids="),
    (dict(seed=-1), "seed=-1 must be None or an integer of at least 0"),
    (dict(seed=1.5), r"seed=1\.5 must be None or an integer"),
    (dict(logprobs="yes"), "logprobs='yes' must be True or False"),
    (dict(ignore_eos=1), "ignore_eos=1 must be True or False"),
)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [(flexijax.CacheConfig, *row) for row in BAD_CONFIGS]
    + [(flexijax.Sampling, *row) for row in BAD_SAMPLINGS],
)
def test_bad_settings_are_refused_where_they_are_made(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_numbers_of_numpy_are_numbers(lm):
    """And a temperature beyond float32 is no warning: it draws evenly, as it would in the limit."""
    sampling = flexijax.Sampling(temperature=1e300, top_k=np.int64(5), seed=np.uint8(7))
    numpys = dict(max_new_tokens=np.int64(3), max_batch=np.int8(1))
    cache = flexijax.CacheConfig(policy="full", budget_tokens=np.int64(64), page_size=np.int8(16))
    out = flexijax.generate(lm, [np.array([1, 2])], sampling=sampling, cache=cache, **numpys)
    assert len(out[0].token_ids) == 3
