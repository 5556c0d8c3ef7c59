"""A server in a thread, over an engine of a tiny model, for the tests of flexijax.server."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest

import flexijax
from flexijax.models.language_model import LanguageModel
from flexijax.models.tokenizer import Tokenizer
from flexijax.policies.flexi import Flexi
from flexijax.policies.minmax import MinMax
from tests.tiny_models import tiny_model
from tests.tiny_runs import SMALL
from tests.tokenizer_files import backend_of

if TYPE_CHECKING:
    from flexijax.server.service import Service
    from flexijax.server.serving import Server

# Tests take these from here, and are skipped where one is missing.
openai, *_ = (
    pytest.importorskip(needed, reason="the serve extra is not installed")
    for needed in ("openai", "fastapi", "uvicorn", "sse_starlette", "prometheus_client")
)
# What the client itself is built on, under its newer or its older name.
httpx = import_module("httpx2" if find_spec("httpx2") else "httpx")

CONTEXT, ROWS = 128, 2
# Its pages can be shared from the first one on; see `short_chunks` too.
CACHE = dataclasses.replace(SMALL, policy=Flexi(score=MinMax()))
SPIN = "".join(f"{{% for a{at} in range(99999) %}}" for at in range(3)) + "{% endfor %}" * 3
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if messages[0].content == 'spin' %}" + SPIN + "{% endif %}assistant:"
)


def served_model() -> LanguageModel:
    """A tiny model that reads and writes bytes, whose texts end nowhere by themselves."""
    backend = backend_of("gpt2")
    words = Tokenizer(
        backend=backend,
        bos_token=None,
        eos_token="</s>",
        stop_ids=frozenset({backend.token_to_id("</s>")}),
        chat_template=TEMPLATE,
    )
    model = tiny_model(vocab_size=backend.get_vocab_size())
    return dataclasses.replace(model, tokenizer=words)


# Compiles in half the time, where it does not matter which.
SIMPLE = dataclasses.replace(SMALL, policy="full")
# Programs that serve these serve everything: one to compile instead of four.
EVERYTHING = flexijax.Sampling(temperature=1.0, top_p=0.5, alternatives=1)


def engine_of(
    lm: LanguageModel,
    sampling: flexijax.Sampling | None = None,
    cache: flexijax.CacheConfig = CACHE,
) -> flexijax.Engine:
    """sampling: the most that requests will ask for, if that is known."""
    engine = flexijax.Engine(lm, cache=cache, max_requests=ROWS, max_context=CONTEXT)
    if sampling is not None:
        engine._core.runner.serve(sampling)
    return engine


@dataclasses.dataclass
class Running:
    """A server that answers."""

    lm: LanguageModel
    service: Service
    server: Server
    url: str

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options
        )

    def async_client(self, **options: Any) -> Any:
        return openai.AsyncOpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options
        )

    def post(self, path: str, content: Any, **options: Any) -> Any:
        return httpx.post(f"{self.url}{path}", json=content, timeout=60, **options)

    def metrics(self, **options: Any) -> dict[str, float]:
        """Samples by name, summed over labels, without `flexijax:`; of now, not a moment ago."""
        self.service._seen = None
        found: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", **options).text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0].removeprefix("flexijax:")
                found[name] = found.get(name, 0) + float(value)
        return found

    def quiet(self, seconds: float = 20) -> None:
        """Waits until nothing runs, and checks that nothing is held."""
        until = time.monotonic() + seconds
        while self.service._held and time.monotonic() < until:
            time.sleep(0.02)
        held = self.service.thread.call(self.service.engine.occupancy).result(10)
        assert self.service._held == 0 and not self.service._jobs
        assert (held.waiting, held.reading, held.running, held.paused) == (0, 0, 0, 0)
        assert held.used_blocks == 0


@contextlib.contextmanager
def serving(
    lm: LanguageModel, engine: flexijax.Engine, *, patience: float = 10, **settings: Any
) -> Iterator[Running]:
    """A server, which is drained at the end; its engine holds nothing then."""
    from flexijax.server.service import Service, Settings
    from flexijax.server.serving import Server, Transport, bind

    service = Service(lm, engine, Settings(**{"names": ("tiny", "alias"), "seed": 1} | settings))
    server = Server(service, Transport(shutdown_timeout=patience))
    socket = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([socket],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(lm, service, server, f"http://127.0.0.1:{socket.getsockname()[1]}")
    finally:
        server.end()
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
    assert engine.num_running == 0 and engine.num_free_blocks == engine.num_blocks
