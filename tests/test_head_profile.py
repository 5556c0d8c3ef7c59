"""Head profiles: their rules, their JSON, and finding the one that fits a model."""

import json
import os
from dataclasses import dataclass, replace

import pytest

from flexijax import profiles
from flexijax.models import presets
from flexijax.models.language_model import fingerprint
from flexijax.profiles.head_profile import HeadProfile

pytestmark = pytest.mark.any_jax

PUBLISHED = {
    "meta-llama/Llama-3.1-8B-Instruct": (32, 64),
    "mistralai/Mistral-7B-Instruct-v0.2": (32, 64),
    "mistralai/Mistral-Small-24B-Instruct-2501": (40, 80),
    "Qwen/Qwen2.5-32B-Instruct": (64, 128),
}
PRESETS = {
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b-v0.2",
    "mistralai/Mistral-Small-24B-Instruct-2501": "mistral-small-24b",
    "Qwen/Qwen2.5-32B-Instruct": "qwen2.5-32b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
}


@dataclass
class Model:
    name: str
    fingerprint: str


@pytest.fixture
def profile() -> HeadProfile:
    return HeadProfile(
        model="us/Toy",
        num_layers=3,
        num_kv_heads=2,
        unstable=((2, 1), (0, 0), (0, 1)),
        page_size=16,
        budget_pages=8,
        source="by hand",
        rco=((0.1, 0.2), (0.9, None), (0.8, -0.25)),
        lost_mass=((0.2, 0.1), (0.0, None), (-0.01, 0.02)),
        measured={"steps": 16, "documents": ["a", "b"]},
    )


def test_heads_of_a_layer(profile):
    assert [profile.unstable_heads(layer) for layer in range(3)] == [(0, 1), (), (1,)]
    assert [profile.stable_heads(layer) for layer in range(3)] == [(), (0, 1), (0,)]
    for layer in (-1, 3):
        with pytest.raises(ValueError, match=f"layer={layer} must be in 0..2"):
            profile.stable_heads(layer)


def test_json_round_trip(profile, tmp_path):
    path = tmp_path / "toy.json"
    profile.save(path)
    again = HeadProfile.load(path)
    assert again == profile and hash(again) == hash(profile)
    assert profiles.load(path) == profile
    assert json.loads(path.read_text())["unstable"] == [[0, 0], [0, 1], [2, 1]]


def test_files_of_the_first_format_load_with_the_list_they_hold(profile, tmp_path):
    """They know nothing of lost mass; a file that has it and says otherwise is refused."""
    path = tmp_path / "old.json"
    fields = json.loads(profile.to_json()) | {"format": "flexijax-head-profile-1"}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="unknown field 'lost_mass'"):
        HeadProfile.load(path)
    del fields["lost_mass"]
    path.write_text(json.dumps(fields))
    old = HeadProfile.load(path)
    assert old == replace(profile, lost_mass=None)
    old.save(path)
    assert HeadProfile.load(path) == old


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "other"}', '{"format": "flexijax-head-profile-1", "model": "m"}'],
)
def test_other_files_are_refused_by_name(text, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json is not a head profile"):
        HeadProfile.load(path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("page_size", "1" + "0" * 400, "page_size=1000.* must be a positive integer"),
        ("page_size", "16.0", "page_size=16.0 must be a positive integer"),
        ("budget_pages", "true", "budget_pages=True must be a positive integer"),
        ("model", "[1]", r"model=\[1\] must be a string"),
        ("fingerprint", "5", "fingerprint=5 must be None or a string"),
        ("unstable", "[[Infinity, 0]]", r"unstable holds \[inf, 0\]"),
        ("unstable", '[["1", 0]]', "unstable holds"),
        ("unstable", "[[0]]", "unstable holds"),
        ("unstable", "7", "unstable=7 must be a list"),
        ("rco", "[[0, NaN], [0, 0], [0, 0]]", "rco must hold finite numbers .* has nan"),
        ("rco", "[[0, 1e999], [0, 0], [0, 0]]", "rco must hold finite numbers .* has inf"),
        ("rco", "[[0, 1" + "0" * 400 + "], [0, 0], [0, 0]]", "rco must hold finite .* has 100"),
        ("rco", '[["0", 0], [0, 0], [0, 0]]', "rco must hold finite numbers .* has '0'"),
        ("rco", "[1, 2, 3]", "rco must hold 3 rows of 2"),
        ("lost_mass", "[1, 2, 3]", "lost_mass must hold 3 rows of 2"),
        ("lost_mass", "[[0, 2], [0, 0], [0, 0]]", "lost_mass must hold .* at most 1, and has 2"),
        ("measured", "[]", r"measured=\[\] must be an object"),
        ("measured", '{"steps": [NaN]}', r"measured.steps=nan must be"),
        ("measured", '{"a": ' + "[" * 30 + "]" * 30 + "}", "measured.a is nested deeper"),
        ("measured", "[" * 100_000, "is not a head profile"),
        ("measured", '{"rco_at_lag": [1]}', r"measured.rco_at_lag=\[1\] must be an object"),
        ("measured", '{"rco_at_lag": {"0": []}}', "measured.rco_at_lag has the key '0'"),
        ("measured", '{"rco_at_lag": {"x": []}}', "measured.rco_at_lag has the key 'x'"),
        ("measured", '{"rco_at_lag": {"4": [[1]]}}', "measured.rco_at_lag.4 must hold 3 rows"),
        ("extra", "1", "unknown field 'extra'"),
    ],
    ids=lambda value: value[:24],
)
def test_values_of_the_wrong_kind_are_refused_by_field(profile, field, value, words, tmp_path):
    """When read, and not after all tokens are made."""
    path = tmp_path / "wrong.json"
    fields = json.loads(profile.to_json())
    fields[field] = "HERE"
    path.write_text(json.dumps(fields).replace('"HERE"', value))
    with pytest.raises(ValueError, match=words) as caught:
        HeadProfile.load(path)
    assert "wrong.json is not a head profile" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_files_that_never_end_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        with pytest.raises(ValueError, match="not a regular file"):
            profiles.load(tmp_path / name)
    with pytest.raises(ValueError, match="neither a file nor a shipped profile"):
        profiles.load("x" * 100_000)
    (tmp_path / "huge").write_bytes(b"")
    os.truncate(tmp_path / "huge", 1 << 40)
    with pytest.raises(ValueError, match="longer than"):
        profiles.load(tmp_path / "huge")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"unstable": ((3, 0),)}, r"\[3, 0\], outside of 3 layers"),
        ({"unstable": ((0, 2),)}, r"\[0, 2\], outside of 3 layers and 2 KV heads"),
        ({"unstable": ((0, 1), (0, 1))}, "twice"),
        ({"page_size": 0}, "page_size=0 must be a positive integer"),
        ({"budget_pages": -1}, "budget_pages=-1 must be a positive integer"),
        ({"source": ""}, "source='' must be a string, and not empty"),
        ({"rco": ((0.1, 0.2),)}, "3 rows of 2"),
        ({"lost_mass": ((0.1, 0.2),)}, "3 rows of 2"),
        ({"rco": ((0.1, float("nan")), (0.0, 0.0), (0.0, 0.0))}, "finite"),
        ({"rco": ((0.1, 1.5), (0.0, 0.0), (0.0, 0.0))}, "at most 1"),
    ],
)
def test_contradictions_are_refused(profile, values, words):
    with pytest.raises(ValueError, match=words):
        replace(profile, **values)


def test_check_lists_what_differs(profile):
    profile.check(num_layers=3, num_kv_heads=2, fingerprint="any: the profile names none")
    with pytest.raises(ValueError) as caught:
        replace(profile, fingerprint="aa").check(num_layers=4, num_kv_heads=8, fingerprint="bb")
    for words in ("us/Toy", "num_layers is 3 in", "4 in", "num_kv_heads is 2", "is aa", "bb in"):
        assert words in str(caught.value)


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("budget_pages", [64, 128])
def test_published_lists_are_shipped(model, budget_pages):
    """A quarter of all KV heads, as published; both tasks name their source."""
    layers, unstable = PUBLISHED[model]
    found = profiles.find(model, budget_pages)
    assert found is not None
    assert (found.model, found.budget_pages, found.page_size) == (model, budget_pages, 16)
    assert (found.num_layers, found.num_kv_heads) == (layers, 8)
    assert len(found.unstable) == unstable == layers * 8 // 4
    assert "NazmulTakbir/FlexiCache-vLLM-extension" in found.source
    stem = model.split("/")[1].lower()
    shipped = {profiles.load(f"{stem}.{task}.{budget_pages}").measured["task"] for task in TASKS}
    assert shipped == set(TASKS)


TASKS = ("gov_report", "paper_assistant")


def test_every_shipped_profile_fits_its_model():
    """By fingerprint, so that a model is known under whatever name its files have."""
    assert len(profiles.names()) >= 17
    for name in profiles.names():
        profile = profiles.load(name)
        assert HeadProfile.from_json(profile.to_json()) == profile
        config = presets.config(PRESETS[profile.model])
        assert profile.fingerprint == fingerprint(config), name
        found = profiles.find(Model("a folder", fingerprint(config)), profile.budget_pages)
        assert found is not None and found.model == profile.model


@pytest.mark.parametrize(
    ("budget_pages", "nearest"), [(1, 64), (64, 64), (90, 64), (91, 128), (4096, 128)]
)
def test_nearest_budget_by_ratio(budget_pages, nearest):
    found = profiles.find("Meta-Llama-3.1-8B-Instruct", budget_pages)
    assert found is not None and found.budget_pages == nearest


def test_find_by_fingerprint_before_name(profile, monkeypatch):
    shipped = {
        "a": replace(profile, fingerprint="right", model="other/Name"),
        "b": replace(profile, fingerprint="wrong"),
        "c": profile,
    }
    monkeypatch.setattr("flexijax.profiles.lookup.names", lambda: tuple(shipped))
    monkeypatch.setattr("flexijax.profiles.lookup._shipped", shipped.__getitem__)
    assert profiles.find(Model("us/Toy", "right"), 8) is shipped["a"]
    assert profiles.find(Model("unheard", "right"), 8) is shipped["a"]
    assert profiles.find(Model("us/Toy", "of no profile"), 8) is shipped["c"]
    assert profiles.find(Model("unheard", "of no profile"), 8) is None


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"profile='llama'.*llama-3\.1-8b-instruct"):
        profiles.load("llama")
    with pytest.raises(ValueError, match="budget_pages=0"):
        profiles.find("llama", 0)
