"""The crowd that behaves badly: the whole bench on a tiny model, and that faults are found."""

import asyncio
import json
import random
import time

import pytest

import flexijax
from bench import serving_storm as bench
from bench.storm_clients import SHARES, Client, Crowd
from bench.storm_wire import Asked, Fault, content_of, told
from tests.server_kit import served_model

pytestmark = pytest.mark.any_jax


def test_the_whole_bench(tmp_path, capsys):
    """A server of its own process, as a user runs it."""
    model, path = tmp_path / "tiny", tmp_path / "storm.json"
    flexijax.save(served_model(), model)
    arguments = ["--quick", "--model", str(model), "--policy", "full", "--json", str(path)]
    code = bench.main([*arguments, "--max-model-len", "192"])
    told_of = capsys.readouterr()
    assert code == 0, told_of.err
    made = json.loads(path.read_text())
    assert made["faults"] == [] and "0 faults" in told_of.out
    assert [row["when"] for row in made["rows"]] == ["before", "round 1", "ended"]
    seen = made["seen"]
    for expected in ("right: 200", "stream: 200 stream", "too_large: 400 context_length_exceeded"):
        assert seen[expected], "each kind came to what it is for"
    assert any("malformed: no JSON: 400 invalid_json" in name for name in seen)
    kinds = {name.split(":")[0] for name in seen}
    assert kinds == {kind.__name__ for kind in SHARES}


def _http(status, content, headers=""):
    body = json.dumps(content).encode()
    head = f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _choice(ids, text):
    return {"choices": [{"token_ids": ids, "text": text}]}


EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
# What a server says to everything, who asks, and the fault.
SAID = [
    (_http(200, _choice([1, 2], "ab")) * 2, Client.right, None),
    (_http(200, _choice([1, 3], "ab")), Client.right, "in place of"),
    (_http(200, _choice([1, 2], "ax")), Client.right, "in place of"),
    (_http(429, {"error": {"message": "m", "code": "c"}}), Client.right, "until when"),
    (_http(500, {}), Client.right, "without a reason"),
    (_http(200, {}), Client.malformed, "was answered with 200"),
    (b"HTTP/1.1 200 OK\r\nContent-", Client.stream, "closed"),
    (EVENTS + b"0\r\n\r\n", Client.stream, "without a word"),
    (b"", Client.right, "no end within"),
]


async def _faults(said, kind):
    """What a crowd of one says of a server that answers everything with the same bytes."""

    async def answer(reader, writer):
        await reader.read(100)
        writer.write(said)
        try:
            await asyncio.sleep(0 if said else 1)
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = "http://127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        asked = [Asked("/v1/completions", {"prompt": "a"}, (1, 2), "ab")]
        client = Client(url=url, asked=asked, draw=random.Random(0), stall_s=0.1, oversized=4)
        crowd = Crowd([client], patience_s=3.0 if said else 0.2)
        await crowd.one(client, kind, time.monotonic() + 0.1)
    return crowd.faults


def test_wrong_answers_are_faults():
    async def all_of_them():
        return await asyncio.gather(*(_faults(said, kind) for said, kind, _ in SAID))

    for found, (said, _, fault) in zip(asyncio.run(all_of_them()), SAID, strict=True):
        assert not found if fault is None else fault in found[0], said


def test_what_is_left_behind_is_found():
    before = {"rss_mb": 900.0, "files": 20, "threads": 30, "idle_share": 0.0}
    later = {"rss_mb": 960.0, "files": 20, "threads": 32, "idle_share": 0.002}
    assert bench.left_behind([before, later, later]) == []
    assert bench.left_behind([before, later, later | {"files": 21}]) == [
        "files: 20 before and 21 after"
    ]
    assert "threads" in bench.left_behind([before, later | {"threads": 40}])[0]
    assert "5.0% of a core" in bench.left_behind([before, later | {"idle_share": 0.05}])[0]
    assert "memory" in bench.left_behind([before, later, later | {"rss_mb": 1000.0}])[0]


def test_refusals_have_to_say_why():
    error = {"error": {"message": "m", "code": "c"}}
    assert told(400, {}, json.dumps(error).encode()) == "400 c"
    for status, body in ((400, b"no"), (400, b"{}"), (503, json.dumps(error).encode())):
        with pytest.raises(Fault):
            told(status, {}, body)
    assert content_of({"delta": {"content": "x"}, "token_ids": [1]}) == ([1], "x")
