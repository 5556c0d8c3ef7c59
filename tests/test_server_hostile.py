"""Clients that leave, stop in the middle or come in crowds, and an engine that fails: nothing is
left behind, nobody waits for ever, and no other request gets another token for it."""

import asyncio
import json
import socket
import threading
import time

import pytest

import flexijax
from tests.server_kit import ROWS, engine_of, httpx, openai, served_model, serving

pytestmark = [pytest.mark.any_jax, pytest.mark.usefixtures("short_chunks")]

PROMPT = [7, 20, 31, 8, 90, 14, 3]


@pytest.fixture(scope="module")
def lm():
    return served_model()


@pytest.fixture(scope="module")
def served(lm):
    with serving(lm, engine_of(lm), max_waiting=40) as running:
        yield running


@pytest.fixture(scope="module")
def expected(lm):
    sampling = flexijax.Sampling(ignore_eos=True)
    made = engine_of(lm).submit(PROMPT, max_new_tokens=100, sampling=sampling).result()
    return list(made.token_ids)


def ask(new, **changes):
    body = {"prompt": PROMPT, "max_tokens": new, "temperature": 0, "return_token_ids": True}
    return body | {"ignore_eos": True} | changes


def connect(running):
    host, port = running.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    return made


def raw(body, path="/v1/completions"):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def same(running, expected, new=20):
    response = running.post("/v1/completions", ask(new))
    assert response.json()["choices"][0]["token_ids"] == expected[:new]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_takes_its_request_along(served, expected, stream):
    before = served.metrics()["generation_tokens_total"]
    leaving = [connect(served) for _ in range(ROWS + 3)]
    for one in leaving:
        one.sendall(raw(ask(100, stream=stream)))
    if stream:
        assert leaving[0].recv(100).startswith(b"HTTP/1.1 200")
    else:
        until = time.monotonic() + 10
        while not served.service._held and time.monotonic() < until:
            time.sleep(0.01)
    for one in leaving:
        one.close()
    served.quiet()
    made = served.metrics()["generation_tokens_total"] - before
    assert made < 100 * len(leaving), "they were answered to their end"
    same(served, expected)


def test_half_written_requests_hold_nothing_up(served, expected):
    whole = raw(ask(5))
    cuts = [1, 20, len(whole) // 2, len(whole) - 1]
    halves = [connect(served) for _ in cuts]
    for one, cut in zip(halves, cuts, strict=True):
        one.sendall(whole[:cut])
    same(served, expected)
    # What comes late is a request like any other.
    halves[2].sendall(whole[cuts[2] :])
    assert halves[2].recv(20).startswith(b"HTTP/1.1 200")
    for one in halves:
        one.close()
    served.quiet()


def test_what_does_not_go_on_is_closed(served, monkeypatch, expected):
    """A head that does not end without an answer, since nobody has asked; a body with one."""
    monkeypatch.setattr("flexijax.server.serving._HEAD_S", 0.2)
    monkeypatch.setattr("flexijax.server.gate._BODY_S", 0.2)
    whole = raw(ask(5))
    for cut in (0, 20):
        with connect(served) as one:
            one.sendall(whole[:cut])
            assert one.recv(100) == b""
    with connect(served) as one:
        one.sendall(whole[:-1])
        answer = one.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408") and b"within 0 seconds" in answer
    same(served, expected)


def test_no_http_at_all(served, expected):
    for content in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\r\n" * 50, b"A" * 100_000):
        with connect(served) as one:
            one.sendall(content)
            one.shutdown(socket.SHUT_WR)
            one.recv(1000)
    same(served, expected)


def test_a_crowd_is_answered_or_told(served, expected):
    """More connections at once than rows and places: 200 or 429, and every 200 is right."""

    async def crowd():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=60, limits=limits) as client:
            asked = (client.post("/v1/completions", json=ask(8 + at % 3)) for at in range(120))
            return await asyncio.gather(*asked)

    answers = asyncio.run(crowd())
    statuses = [one.status_code for one in answers]
    assert set(statuses) <= {200, 429} and statuses.count(200) >= ROWS
    for at, one in enumerate(answers):
        if one.status_code == 200:
            assert one.json()["choices"][0]["token_ids"] == expected[: 8 + at % 3]
        else:
            assert one.json()["error"]["type"] == "rate_limit_error"
            assert int(one.headers["retry-after"]) >= 1
    served.quiet()


def test_a_slow_reader_holds_up_nobody(served, expected):
    slow = connect(served)
    slow.sendall(raw(ask(100, stream=True, logprobs=0)))
    same(served, expected, new=30)
    served.quiet()
    text = b""
    while b"[DONE]" not in text:
        text += slow.recv(65536)
    slow.close()
    events = [line[6:] for line in text.decode().splitlines() if line.startswith("data: {")]
    ids = [one for event in events for one in json.loads(event)["choices"][0]["token_ids"]]
    assert ids == expected


def test_who_takes_no_answer_is_gone(lm, monkeypatch):
    """An answer of more bytes than the system keeps, of which nothing is read: let go of in time,
    whatever route it is of; one that is read slowly, but read, comes to its end."""
    monkeypatch.setattr("flexijax.server.serving._SEND_S", 0.5)
    body = {"prompt": "a b c " * 120_000, "return_token_strs": True}
    with serving(lm, engine_of(lm)) as running:
        unread, slow = connect(running), connect(running)
        for one in (unread, slow):
            one.sendall(raw(body, "/tokenize"))
        assert slow.recv(15).startswith(b"HTTP/1.1 200")
        length = 0
        while part := slow.recv(1 << 18):
            length += len(part)
            time.sleep(0.1)
            if part.endswith(b"}"):
                break
        assert length > 4 << 20, "the system may keep that much"
        time.sleep(0.5)
        got = 0
        while part := unread.recv(1 << 20):
            got += len(part)
        assert 0 < got < length, "what the system had kept comes, and then the end"
        for one in (unread, slow):
            one.close()


def test_an_allocation_that_fails_is_told_and_forgotten(lm, monkeypatch):
    """Those that had a row are told; later ones get their own tokens, and no block of what was
    lost."""
    engine = engine_of(lm)
    long = "jumps over the lazy dog " * 12
    with serving(lm, engine) as running, running.client() as client:

        def create(**changes):
            body = dict(model="tiny", prompt=long, max_tokens=40, temperature=0) | changes
            return client.completions.create(**body, extra_body={"ignore_eos": True})

        right = create().choices[0].text
        runner, failing = engine._core.runner, threading.Event()
        step = runner.dispatch

        def failed(rows=None):
            if failing.is_set():
                failing.clear()
                raise MemoryError("RESOURCE_EXHAUSTED: out of memory")
            return step(rows)

        monkeypatch.setattr(runner, "dispatch", failed)
        stream = create(stream=True)
        next(stream)
        failing.set()
        with pytest.raises(openai.APIError, match="RESOURCE_EXHAUSTED"):
            list(stream)
        running.quiet()
        again = create()
        assert again.choices[0].text == right
        assert again.usage.prompt_tokens_details.cached_tokens == 0
        failing.set()
        with pytest.raises(openai.InternalServerError, match="RESOURCE_EXHAUSTED") as caught:
            create()
        assert caught.value.status_code == 503
        assert create().choices[0].text == right
        assert running.metrics()["request_refused_total"] == 1
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_an_engine_that_ends_is_told(lm, monkeypatch):
    engine = engine_of(lm)
    with serving(lm, engine) as running:
        with monkeypatch.context() as patch:
            patch.setattr(engine, "step", lambda: (_ for _ in ()).throw(SystemExit("no more")))
            response = running.post("/v1/completions", ask(5))
            assert response.status_code == 503 and "SystemExit" in response.text
        for made in (running.post("/v1/completions", ask(5)), httpx.get(f"{running.url}/health")):
            assert made.status_code == 503
            assert made.json()["error"]["code"] == "engine_failed"
        assert httpx.get(f"{running.url}/metrics").status_code == 200
        engine._core.entries.clear()
        engine._submitted.clear()


def test_a_drain_lets_requests_end_and_refuses_others(lm):
    engine = engine_of(lm)
    with serving(lm, engine) as running, running.client() as client:
        with client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            next(stream)
            kept = httpx.Client(base_url=running.url)
            assert kept.get("/health").status_code == 200
            running.server.end()
            until = time.monotonic() + 5
            while not running.service.draining and time.monotonic() < until:
                time.sleep(0.005)
            response = kept.post("/v1/completions", json=ask(5))
            if running.service._held:  # it has not ended meanwhile
                assert response.status_code == 503 and response.headers["retry-after"]
                assert response.json()["error"]["code"] == "shutting_down"
            kept.close()
            *_, last = stream
            assert last.choices[0].finish_reason == "length"


def test_a_drain_has_an_end(lm, monkeypatch):
    """What has not ended by then is told so."""
    engine = engine_of(lm)
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
    with serving(lm, engine, patience=0.3) as running, running.client() as client:
        stream = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(stream)
        whole = []
        other = threading.Thread(
            target=lambda: whole.append(running.post("/v1/completions", ask(100)))
        )
        other.start()
        while running.service._held < 2:
            time.sleep(0.01)
        running.server.end()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        other.join(20)
        assert whole[0].status_code == 503
        assert whole[0].json()["error"]["code"] == "shutting_down"


def test_an_idle_server_costs_nothing(lm):
    """Of processor time, all threads counted; what polls every millisecond costs percents."""
    with serving(lm, engine_of(lm)) as running:
        assert running.post("/v1/completions", ask(5, stream=True)).status_code == 200
        running.quiet()
        time.sleep(0.3)
        started = time.process_time()
        time.sleep(1.5)
        assert time.process_time() - started < 0.03
