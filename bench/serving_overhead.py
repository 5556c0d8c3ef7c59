"""What the server adds to a decode step: `python -m bench.serving_overhead`.

Rows of the same prompt decode in `flexijax.Engine` by itself; through `flexijax serve`'s own
classes, with a client in another process that streams each of them; and by itself again, beside a
process that takes as much processor time at each boundary as the client did. Rounds take turns, and
times are medians of sixteen steps, since a shared machine is slow for seconds at a time. What the
server costs is the second against the third: a client on another machine takes nothing here. Also
reported is the processor time of the event loop for each decode step. No number is shown unless all
tokens are the same.
"""

import argparse
import contextlib
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import flexijax
from bench import results
from bench.timing import median, table
from flexijax.cli.terminal import return_freed_memory, use_compilation_cache

COLUMNS = (
    *("policy", "rows", "step_ms", "beside_step_ms", "served_step_ms", "loop_ms", "client_ms"),
    *("loop_share", "server_slower", "client_slower"),
)
# Steps from one rerank of a row to the next.
CHUNK = 16


class Watched:
    """Notes when each call of `engine.step` ends, whoever calls it, and how many tokens it made."""

    def __init__(self, engine: flexijax.Engine, at_boundary: Callable[[], object]) -> None:
        self._engine, self._at_boundary = engine, at_boundary
        self._step = engine.step
        self._ends: list[tuple[float, int]] = []
        engine.step = self.step

    def step(self) -> bool:
        """`Engine.step`."""
        left = self._step()
        self._at_boundary()
        self._ends.append((time.perf_counter(), self._engine.totals.new_tokens))
        return left

    def close(self, rows: int, chunk: int) -> list[float]:
        """Milliseconds a step of every chunk of so many steps in which all rows ran.

        A chunk, since what comes at its end, such as a rerank, is in each of them once.
        """
        self._engine.step = self._step
        steps, found, together = self._engine.boundary_steps, [], []
        for (before, made), (after, in_all) in zip(self._ends, self._ends[1:], strict=False):
            together = [*together, after - before] if in_all - made == rows * steps else []
            if len(together) * steps == chunk:
                found.append(1e3 * sum(together) / chunk)
                together = []
        return found


def alone(
    engine: flexijax.Engine,
    prompt: list[int],
    rows: int,
    new: int,
    at_boundary: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """step_ms: milliseconds a step while all rows run, of each chunk; tokens: of each row."""
    sampling = flexijax.Sampling(ignore_eos=True)
    watched = Watched(engine, at_boundary)
    streams = [engine.submit(prompt, max_new_tokens=new, sampling=sampling) for _ in range(rows)]
    while engine.step():
        pass
    tokens = [list(stream.result().token_ids) for stream in streams]
    return {"step_ms": watched.close(rows, CHUNK), "tokens": tokens}


def busy(boundaries: Connection) -> None:
    """A process that takes so many seconds of processor time whenever it is sent a number."""
    with contextlib.suppress(EOFError):
        while True:
            seconds = boundaries.recv()
            until = time.process_time() + seconds
            while time.process_time() < until:
                pass


@contextlib.contextmanager
def beside(seconds: float) -> Iterator[Callable[[], object]]:
    """What has another process take so many seconds of processor time, without waiting for it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=busy, args=(theirs,))
    process.start()
    theirs.close()
    yield lambda: ours.send(seconds)
    ours.close()
    process.join()


def client(url: str, prompt: list[int], rows: int, new: int, answers: Any) -> None:
    """Streams all rows at once; in a process of its own, so that its time is not the server's.

    Answers with the tokens, and seconds of processor time for each event of every row.
    """
    import asyncio

    import openai

    began: dict[int, tuple[float, int]] = {}
    events = 0

    async def one(api: Any, at: int) -> list[int]:
        nonlocal events
        ask = {"ignore_eos": True, "return_token_ids": True}
        stream = await api.completions.create(
            model="m", prompt=prompt, max_tokens=new, temperature=0, stream=True, extra_body=ask
        )
        tokens = []
        async for event in stream:
            tokens += event.choices[0].token_ids
            events += 1
            began.setdefault(at, (time.process_time(), events))
        return tokens

    async def everybody() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as api:
            return await asyncio.gather(*(one(api, at) for at in range(rows)))

    tokens = asyncio.run(everybody())
    all_began, before = max(began.values())
    answers.put((tokens, (time.process_time() - all_began) * rows / max(events - before, 1)))


class Served:
    """A server in a thread, over an engine."""

    def __init__(self, lm: flexijax.LanguageModel, engine: flexijax.Engine) -> None:
        from flexijax.server.service import Service, Settings
        from flexijax.server.serving import Server, Transport, bind

        socket = bind("127.0.0.1", 0)
        self.engine = engine
        self.server = Server(Service(lm, engine, Settings(names=("m",))), Transport())
        self.thread = threading.Thread(target=self.server.run, args=([socket],))
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        """Waits for its end."""
        self.server.end()
        self.thread.join()

    def cpu_s(self) -> float:
        """Processor seconds of the event loop's thread."""
        assert self.thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self.thread.ident))

    def measure(self, prompt: list[int], rows: int, new: int) -> dict[str, Any]:
        """As `alone`, and the milliseconds of the loop and of the client for each step."""
        context, watched = multiprocessing.get_context("spawn"), Watched(self.engine, lambda: None)
        answers, totals = context.Queue(), self.engine.totals
        process = context.Process(target=client, args=(self.url, prompt, rows, new, answers))
        read = totals.prompt_tokens
        process.start()
        # Nothing here may hold up the engine.
        while totals.prompt_tokens < read + rows * len(prompt):
            time.sleep(0.01)
        began, loop = totals.new_tokens, self.cpu_s()
        tokens, boundary_s = answers.get()
        steps = (totals.new_tokens - began) / rows
        process.join()
        return {
            "step_ms": watched.close(rows, CHUNK),
            "loop_ms": 1e3 * (self.cpu_s() - loop) / steps,
            "client_ms": 1e3 * boundary_s / self.engine.boundary_steps,
            "tokens": tokens,
        }


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return_freed_memory()
    use_compilation_cache()
    lm = flexijax.load("smollm2")
    assert lm.tokenizer is not None
    prompt = (lm.tokenizer.encode("The quick brown fox jumps over the lazy dog. ") * 1000)[
        : args.prompt_tokens
    ]
    rows = []
    for policy in args.policies:
        engine = flexijax.Engine(
            lm,
            cache=flexijax.CacheConfig(policy=policy),
            max_requests=args.rows,
            max_context=args.max_context or args.prompt_tokens + args.new_tokens,
            # Else the first rows have ended before the last prompt is read.
            prefill_first=True,
        )
        engine.compile(flexijax.Sampling(temperature=1.0))  # as the server does
        ask = (prompt, args.rows, args.new_tokens)
        plain, through, crowded = [], [], []
        for turn in range(args.rounds):
            plain.append(alone(engine, *ask))
            served = Served(lm, engine)
            through.append(served.measure(*ask))
            served.close()
            boundary_ms = through[-1]["client_ms"] * engine.boundary_steps
            with beside(boundary_ms / 1e3) as at_boundary:
                crowded.append(alone(engine, *ask, at_boundary))
            found = [of[-1]["tokens"] for of in (plain, through, crowded)]
            if not found[0] == found[1] == found[2]:
                print("tokens differ: nothing is reported", file=sys.stderr)
                return 1
            steps = [median(of[-1]["step_ms"]) for of in (plain, crowded, through)]
            print(f"{policy}, round {turn + 1}: {steps} ms", file=sys.stderr, flush=True)
        step, near, served_step = (
            median(ms for one in of for ms in one["step_ms"]) for of in (plain, crowded, through)
        )
        loop, clients = (median(one[of] for one in through) for of in ("loop_ms", "client_ms"))
        row = {"policy": policy, "rows": args.rows, "step_ms": step, "served_step_ms": served_step}
        row |= {"beside_step_ms": near, "loop_ms": loop, "client_ms": clients}
        row |= {"loop_share": loop / step, "server_slower": served_step / near}
        rows.append(row | {"client_slower": near / step})
    print(table(rows, COLUMNS))
    results.write(args.json, "serving_overhead", args, rows=rows)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serving_overhead", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and environment")
    parser.add_argument("--policies", nargs="+", default=["full", "flexi"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--max-context", type=int, help="of the engine (what they take)")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
