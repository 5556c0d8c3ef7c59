"""Law 8: bad input is refused, by name, before anything is traced."""

import math

import pytest

import flexijax
from flexijax.compiled import num_compiled
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
    "no batch": (dict(max_batch=0), "max_batch=0"),
    "bool batch": (dict(max_batch=True), "max_batch=True"),
    "float batch": (dict(max_batch=1.5), r"max_batch=1\.5"),
    "foreign profile": (dict(profile=profile_of(3)), "num_layers is 3 in the profile and 2"),
    "no profile": (dict(profile=None), "profile=None"),
    "fewer samplings": (dict(sampling=[]), "sampling has 0 entries for 1 prompts"),
    "flat ids": (dict(prompts=[1, 2, 3]), r"prompts\[0\]=1 must be"),
    "fractional token": (dict(prompts=[[1.5]]), r"prompts\[0\]=\[1\.5\] must be"),
    "stop without tokenizer": (dict(sampling=flexijax.Sampling(stop=("x",))), "stop="),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_before_any_tracing(name, lm):
    changes, message = BAD_CALLS[name]
    call = dict(prompts=[[1, 2]], max_new_tokens=20, profile=profile_of(2)) | changes
    before = num_compiled()
    with pytest.raises(ValueError, match=message):
        flexijax.generate(lm, call.pop("prompts"), **call)
    assert num_compiled() == before


BAD_CONFIGS = (
    (dict(mode="dense"), "mode='dense'"),
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
)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [(flexijax.CacheConfig, *row) for row in BAD_CONFIGS]
    + [(flexijax.Sampling, *row) for row in BAD_SAMPLINGS],
)
def test_bad_settings_are_refused_where_they_are_made(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)
