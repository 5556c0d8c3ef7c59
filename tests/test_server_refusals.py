"""Whatever is not answered says why: a status, the field at fault, and what would be right."""

import base64
import json
import logging
import threading

import pytest

from flexijax.engine.sampling import Sampling
from tests.server_kit import CONTEXT, SIMPLE, engine_of, httpx, openai, served_model, serving

pytestmark = pytest.mark.any_jax

TEXT = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 4}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def served():
    lm = served_model()
    with serving(
        lm, engine_of(lm, Sampling(temperature=1.0), SIMPLE), max_waiting=6, max_body=50_000
    ) as running:
        yield running


def refused(response, status, param=None, *words):
    """The error of a response, after looking at its shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"]
    assert error["param"] == param, error
    for word in words:
        assert word in error["message"], error
    return error


COMMON = [
    ("temperature", -1, "greater"),
    ("temperature", "hot", "number"),
    ("temperature", True, "number"),
    ("top_p", 0, "greater"),
    ("top_k", 1.5, "integer"),
    ("min_p", 2, "less"),
    ("n", 0, "greater"),
    ("n", 129, "less"),
    ("max_tokens", 0, "greater"),
    ("max_tokens", "5", "integer"),
    ("seed", 2**70, "less"),
    ("stop", ["a", ""], "empty"),
    ("stop", ["a"] * 17, "16"),
    ("stop_token_ids", list(range(17)), "16"),
    ("frequency_penalty", 0.5, "penalties"),
    ("presence_penalty", -1, "penalties"),
    ("logit_bias", {"5": 100}, "logits"),
    ("response_format", {"type": "json_object"}, "constrain"),
    ("stream_options.include_usage", 1, "bool"),
    ("unheard_of", 1, "not supported"),
]
OF_TEXT = [
    ("prompt", "", "empty"),
    ("prompt", [], "empty"),
    ("prompt", [[]], "empty"),
    ("prompt", ["a", 3], "list of either"),
    ("prompt", [5, -1], "token ids"),
    ("prompt", [5, 10**6], "not in 0.."),
    ("prompt", None, "must be a text"),
    ("prompt", ["x"] * 129, "at most 128"),
    ("best_of", 3, "best_of"),
    ("suffix", "x", "not supported"),
    ("logprobs", 21, "less"),
]
OF_CHAT = [
    ("messages", [], "at least 1"),
    ("messages.0.role", "king", "'user'"),
    ("messages.0.content", None, "must be a text"),
    ("messages.0.content", [{"type": "image_url", "image_url": {}}], "text"),
    ("messages.0.tool_calls", [{}], "tools"),
    ("tools", [TOOL], "tools"),
    ("tool_choice", "required", "tools"),
    ("functions", [{}], "tools"),
    ("max_completion_tokens", 0, "greater"),
    ("modalities", ["audio"], "text"),
    ("top_logprobs", 21, "less"),
]


def with_field(body, name, value):
    """A copy of a body, with the field that a dotted name leads to."""
    made = json.loads(json.dumps(body))
    *path, last = name.split(".")
    at = made
    for part in path:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    at[last] = value
    return made | ({"stream": True} if name.startswith("stream_options") else {})


@pytest.mark.parametrize(
    "path, body, name, value, word",
    [("/v1/completions", TEXT, *case) for case in COMMON + OF_TEXT]
    + [("/v1/chat/completions", CHAT, *case) for case in COMMON + OF_CHAT],
)
def test_a_field_that_cannot_be_followed_is_named(served, path, body, name, value, word):
    response = served.post(path, with_field(body, name, value))
    refused(response, 400, name, word)


@pytest.mark.parametrize("path, body", [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
def test_values_that_change_nothing_are_taken(served, path, body):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": 1}
    neutral |= {"stop": None, "user": "someone", "response_format": {"type": "text"}, "top_k": -1}
    if path.endswith("chat/completions"):
        neutral |= {"tools": [], "tool_choice": "none", "parallel_tool_calls": True}
    assert served.post(path, body | neutral).status_code == 200


def test_what_does_not_go_together(served):
    refused(
        served.post("/v1/completions", TEXT | {"stream_options": {}}), 400, None, "stream: true"
    )
    asked = TEXT | {"echo": True, "logprobs": 0}
    refused(served.post("/v1/completions", asked), 400, "logprobs", "echoed")
    asked = CHAT | {"top_logprobs": 2}
    refused(served.post("/v1/chat/completions", asked), 400, None, "logprobs: true")
    asked = CHAT | {"max_completion_tokens": 5}
    refused(served.post("/v1/chat/completions", asked), 400, "max_tokens", "differ")


def test_what_does_not_fit_is_refused_with_the_arithmetic(served):
    for prompt, most in (([7] * 100, 29), ([7] * CONTEXT, 1), ("fox " * 400, 1)):
        asked = TEXT | {"prompt": prompt, "max_tokens": most}
        error = refused(served.post("/v1/completions", asked), 400, None, "tokens", str(CONTEXT))
        assert error["code"] == "context_length_exceeded"
    # A stream is refused before it begins.
    asked |= {"stream": True}
    assert refused(served.post("/v1/completions", asked), 400)
    refused(served.post("/v1/completions", TEXT | {"n": 9}), 400, "n", "8 that may wait")
    served.quiet()


@pytest.mark.parametrize(
    "content, kind, word",
    [
        (b"{", "application/json", "no JSON"),
        (b"", "application/json", "the body"),
        (b"\xff\xfe", "application/json", "JSON"),
        (b"[" * 20_000, "application/json", ""),
        (b'{"prompt": "\\ud800", "max_tokens": 1}', "application/json", "Unicode"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json", "temperature"),
        (b'"text"', "application/json", "the body"),
        (b"prompt=a", "application/x-www-form-urlencoded", "Content-Type"),
    ],
)
def test_a_body_that_is_no_request(served, content, kind, word):
    response = httpx.post(
        f"{served.url}/v1/completions", content=content, headers={"content-type": kind}
    )
    assert response.status_code == 400
    assert word in response.json()["error"]["message"]


def test_a_body_that_is_too_long(served):
    asked = TEXT | {"prompt": "x" * 60_000}
    error = refused(served.post("/v1/completions", asked), 413, None, "50000 bytes")
    assert error["code"] == "request_too_large"

    def parts():
        yield b'{"prompt": "'
        yield from (b"x" * 10_000 for _ in range(30))

    headers = {"content-type": "application/json"}
    response = httpx.post(f"{served.url}/v1/completions", content=parts(), headers=headers)
    refused(response, 413)


def test_routes_that_there_are_not(served):
    refused(httpx.get(f"{served.url}/v1/nothing"), 404)
    response = httpx.get(f"{served.url}/v1/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    refused(served.post("/v1/completions", TEXT | {"model": "gpt-4"}), 404, "model", "tiny, alias")
    refused(served.post("/tokenize", {}), 400, None, "either prompt or messages")
    refused(served.post("/detokenize", {"tokens": [5000]}), 400, "tokens", "5000")


def test_a_template_that_does_not_end(served):
    asked = CHAT | {"messages": [{"role": "user", "content": "spin"}]}
    refused(served.post("/v1/chat/completions", asked), 400, "messages", "processor time")
    assert served.post("/v1/chat/completions", CHAT).status_code == 200
    served.quiet()


def test_a_full_queue_says_when_to_come_again(served):
    """2 rows and 6 places behind them."""
    with served.client() as client:
        long = dict(model="tiny", prompt=[7] * 20, max_tokens=100, n=4, stream=True)
        streams = [
            client.completions.create(**long, extra_body={"ignore_eos": True}) for _ in range(2)
        ]
        try:
            with pytest.raises(openai.RateLimitError, match="8 may") as caught:
                client.completions.create(model="tiny", prompt="a", max_tokens=1)
            assert int(caught.value.response.headers["retry-after"]) >= 1
            held = served.metrics()
            assert held["num_requests_waiting"] > 0 and held["kv_cache_usage_perc"] > 0
        finally:
            for stream in streams:
                stream.close()
    served.quiet()
    assert served.post("/v1/completions", TEXT).status_code == 200


def test_a_key_guards_all_but_health(caplog):
    lm = served_model()
    with serving(lm, engine_of(lm, Sampling(temperature=1.0), SIMPLE), api_key="sésame") as running:
        assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}
        for path in ("/", "/metrics", "/v1/models", "/tokenizer_info", "/openapi.json", "/nothing"):
            refused(httpx.get(f"{running.url}{path}"), 401)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            error = refused(running.post(path, {}), 401)
            assert error["code"] == "invalid_api_key"
        for header in ("sésame", "Bearer sesame", "Bearer", "Basic %%%", "Digest sésame"):
            response = running.post(
                "/v1/completions", TEXT, headers={"authorization": header.encode()}
            )
            refused(response, 401)
        right = {"authorization": "Bearer sésame".encode()}
        assert running.post("/v1/completions", TEXT, headers=right).status_code == 200
        # A browser may show the page, and asks for nothing that costs anything by itself.
        basic = {"authorization": "Basic " + base64.b64encode("me:sésame".encode()).decode()}
        assert "text/html" in httpx.get(f"{running.url}/", headers=basic).headers["content-type"]
        refused(running.post("/v1/completions", TEXT, headers=basic), 401)


def test_pages_of_named_origins_may_ask():
    lm = served_model()
    with serving(
        lm,
        engine_of(lm, Sampling(temperature=1.0), SIMPLE),
        allowed_origins=("https://a.example",),
        api_key="k",
    ) as running:
        for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
            asked = {"origin": origin, "access-control-request-method": "POST"}
            response = httpx.options(f"{running.url}/v1/completions", headers=asked)
            assert ("access-control-allow-origin" in response.headers) == allowed


def test_logs_say_nothing_of_what_was_asked(served, caplog):
    secret = "xyzzy"
    with caplog.at_level(logging.DEBUG, logger="flexijax.server"):
        for extra in ({}, {"stop": secret}, {"n": secret}, {secret: 1}, {"prompt": [secret, 3]}):
            served.post("/v1/completions", TEXT | {"prompt": f"say {secret}"} | extra)
        asked = {"messages": [{"role": secret, "content": secret}]}
        served.post("/v1/chat/completions", asked)
    lines = [record.getMessage() for record in caplog.records if record.name == "flexijax.server"]
    assert len(lines) == 6 and all(line.startswith("POST /v1/") for line in lines)
    assert secret not in "".join(lines)
    assert threading.active_count() < 50
