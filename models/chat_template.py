"""From a conversation to its prompt: chat templates, rendered within bounds of time and memory."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from flexijax.models.files import short

# Of one rendering; both grow with the messages, since long ones are allowed to take longer.
_SECONDS, _SECONDS_PER_MB = 1.0, 0.2
_MEGABYTES, _MEGABYTES_PER_MB = 150, 16
_WALL_SECONDS = 120.0  # for a machine too busy to give a process its seconds
_MAX_DEPTH = 50
# Names under which a message's reasoning is passed; the first is what templates read.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatPrompt(str):
    """The prompt of a chat template: its special tokens are spelled out, none is to be added.

    A plain str otherwise; with text added at its end (the beginning of an answer) it stays one.
    """

    def __add__(self, other: str) -> ChatPrompt:
        return ChatPrompt(str(self) + other)


def render(
    template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]
) -> ChatPrompt:
    """The prompt of a conversation, ready for the assistant's answer.

    messages: dicts with "role" and "content"; special_tokens: what the template knows by the names
    bos_token, eos_token and so on. As `apply_chat_template(add_generation_prompt=True)` of
    transformers, tools and documents None. ValueError for what the template refuses, for a
    template with a fault, and for one that takes more than about a second or 150 MB.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages={short(messages)}: must be a list of messages")
    if not messages:
        raise ValueError("messages=[]: a chat needs at least one message")
    variables: dict[str, Any] = dict(special_tokens)
    variables |= {"tools": None, "documents": None, "add_generation_prompt": True}
    variables["messages"] = [_message(message, index) for index, message in enumerate(messages)]
    return ChatPrompt(_worker.render(template, variables))


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}]={short(message)}: must be a dict")
    # Keys without a value are left out and reasoning gets all its names, as transformers does.
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[key] for key in _REASONING if key in given), None)
    if reasoning is not None:
        given = {"thinking": reasoning, **given, "reasoning_content": reasoning}
    return _plain(given, f"messages[{index}]", _MAX_DEPTH)


def _plain(value: Any, name: str, depth: int) -> Any:
    """A copy out of plain Python types: what goes to the template has no methods of its own."""
    if depth == 0:
        raise ValueError(f"{name}: nested deeper than {_MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {
            _plain(key, name, depth - 1): _plain(item, name, depth - 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [_plain(item, name, depth - 1) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return f"<{type(value).__name__}>"  # an image, say: templates only look whether it is there


class _Worker:
    """The process that renders, started with the first chat: one for all templates and threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._parents: subprocess.Popen[bytes] | None = None  # kept, or its end would be awaited

    def render(self, template: str, variables: dict[str, Any]) -> str:
        length = len(pickle.dumps(variables)) / 1e6
        seconds = _SECONDS + _SECONDS_PER_MB * length
        megabytes = int(_MEGABYTES + _MEGABYTES_PER_MB * length)
        request = pickle.dumps((template, variables, seconds, megabytes))
        with self._lock:
            process = self._started()
            try:
                kind, answer = _ask(process, request, limit=megabytes << 20)
                if kind == b"M":
                    self.stop()  # what it took may be in pieces: the next starts afresh
            except (OSError, EOFError, TimeoutError) as error:
                self.stop()
                raise ValueError(_death(process, error, seconds)) from error
            except BaseException:  # interrupted: what it answers later belongs to nobody
                self.stop()
                raise
        if kind == b"O":
            return answer.decode("utf-8", "surrogatepass")
        raise ValueError(f"the chat template refused the messages: {answer.decode()}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        process.wait()

    def forget(self) -> None:
        """In a forked child: the process is the parent's, and so may be the lock."""
        self._parents, self._process, self._lock = self._process, None, threading.Lock()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            program = Path(__file__).with_name("chat_worker.py")
            packages = {_folder_of("jinja2"), _folder_of("markupsafe")}
            # -I -S: neither the user's settings nor site's hooks, which take most of the start.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(program), *sorted(packages)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
            )
        return self._process


def _folder_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"chat templates need the package {package}")
    return str(Path(next(iter(spec.submodule_search_locations))).parent)


def _ask(process: subprocess.Popen[bytes], request: bytes, limit: int) -> tuple[bytes, bytes]:
    assert process.stdin is not None and process.stdout is not None
    rest = memoryview(struct.pack("<Q", len(request)) + request)
    while rest:
        rest = rest[process.stdin.write(rest) :]
    head = _read(process, 9)
    size = struct.unpack("<Q", head[1:])[0]
    if size > limit:
        raise OSError(f"an answer of {size} bytes")
    return head[:1], _read(process, size)


def _read(process: subprocess.Popen[bytes], size: int) -> bytes:
    assert process.stdout is not None
    pieces = []
    while size:
        if not _readable(process.stdout):
            raise TimeoutError(f"no answer for {_WALL_SECONDS:.0f} seconds")
        piece = process.stdout.read(min(size, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _readable(pipe: IO[bytes]) -> bool:
    """Whether there is something to read, waited for; always where a pipe cannot be polled."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    return bool(poll.poll(_WALL_SECONDS * 1000))


def _death(process: subprocess.Popen[bytes], error: BaseException, seconds: float) -> str:
    code = process.returncode
    if code == -getattr(signal, "SIGPROF", 0):
        return f"the chat template takes more than {seconds:.1f} seconds of processor time"
    cause = str(error) or f"its process ended with status {code}"
    return f"the chat template could not be rendered: {cause}"


_worker = _Worker()
atexit.register(_worker.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.forget)
