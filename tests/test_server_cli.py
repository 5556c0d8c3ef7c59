"""`flexijax serve`: what it refuses before a model is loaded, and how a signal ends it."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

import flexijax
from flexijax.cli import main as cli
from tests.server_kit import httpx, openai, served_model

pytestmark = pytest.mark.any_jax


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    flexijax.save(served_model(), path)
    return path


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tensor-parallel-size", "2"], "must be 1 to 1"),
        (["--tensor-parallel-size", "0"], "must be 1 to 1"),
        (["--max-num-batched-tokens", "512"], "depend on the prompt alone"),
        (["--profile", "auto"], "flexijax profile"),
        (["--port", "70000"], "65535"),
        (["--ssl-keyfile", "key.pem"], "go together"),
        (["--allowed-origins", '"*"'], "JSON list"),
        (["--allowed-origins", "https://a.example"], "invalid"),
        (["--max-waiting", "-1"], "at least 0"),
        (["--policy", "full", "--score", "sketch2"], "scores no pages"),
        (["--host", "192.0.2.1"], "--host=192.0.2.1"),
        (["--stream-interval", "7", "--policy", "full"], "4 tokens of a request at a time"),
        (["--chat-template", "/nowhere/a.jinja", "--policy", "full"], "No such file"),
        (["--device-bytes", "many", "--policy", "full"], "device_bytes"),
    ],
)
def test_what_cannot_be_followed_is_refused(folder, capsys, options, words):
    arguments = ["serve", "--model", str(folder), "--port", "0", "--quiet", *options]
    try:
        code = cli.main(arguments)
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr().err
    assert code == 2 and words in told and len(told.splitlines()) == 1


def test_a_missing_extra_is_named(folder, capsys, monkeypatch):
    from flexijax.cli import serve

    monkeypatch.setitem(serve._NEEDS, "no_such_package", "no-such-package")
    assert cli.main(["serve", "--model", str(folder)]) == 2
    assert "no-such-package: pip install" in capsys.readouterr().err


def test_a_signal_lets_requests_end(folder, tmp_path):
    """The whole command, over two devices: it serves, and on SIGTERM in the middle of an answer it
    goes on to the end of it and then ends with 0."""
    report = tmp_path / "totals.json"
    template = tmp_path / "short.jinja"
    template.write_text("{{ messages[0].content }}!")
    arguments = ["--model", str(folder), "--port", "0", "--policy", "full", "--page-size", "4"]
    arguments += ["--max-model-len", "256", "--max-num-seqs", "2", "--json", str(report)]
    arguments += ["--served-model-name", "tiny", "--chat-template", str(template)]
    arguments += ["--tensor-parallel-size", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flexijax", "serve", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"FLEXIJAX_API_KEY": "k", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    )
    limit = threading.Timer(120, process.kill)
    limit.start()
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        found = next(made for line in lines if (made := re.search(r"http://\S+:\d+", line)))
        url = found[0]
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            chat = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "abc"}],
                max_tokens=200,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            next(chat)
            process.send_signal(signal.SIGTERM)
            *_, last = chat
        assert last.usage.completion_tokens == 200
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 0 and "Traceback" not in told
        assert "SIGTERM" in told and "POST /v1/chat/completions 200" in told
        assert json.loads(report.read_text())["totals"]["new_tokens"] == 200
    finally:
        limit.cancel()
        process.kill()
        process.communicate()
