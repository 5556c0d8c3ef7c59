"""What the server adds to a decode step: `python -m bench.serving_overhead`.

Rows of one prompt decode behind `flexijax serve`'s own classes, with a client in another process
that streams each of them. Chunks of sixteen steps take turns within one decode, since a shared
machine is slow for seconds at a time:

- served: what comes at each boundary is handed to the event loop, and streamed;
- held: the same engine, thread and connections, but what comes is held back;
- beside: as held, beside a process that takes at each boundary the processor time that the client
  took for one.

What was held back goes out with what the next served chunk begins with, so all of the server's work
is timed. Served chunks are compared to the others of their own turns, and the medians of those
ratios are shown with their 95 % interval: to held, and to beside, since a client on another machine
takes nothing here. Also shown is the processor time of the event loop for a step. There are no
numbers unless all tokens are those that the engine makes by itself.
"""

import argparse
import contextlib
import gc
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
from bench.step_turns import CHUNK, HELD, ORDERS, Turns, ratio
from bench.timing import median, table
from flexijax.cli.terminal import return_freed_memory, use_compilation_cache

COLUMNS = (
    *("policy", "rows", "turns", "held_ms", "beside_ms", "served_ms"),
    *("to_held", "to_held_from", "to_held_to", "to_beside", "to_beside_from", "to_beside_to"),
    *("loop_ms", "loop_share", "client_ms"),
)


def alone(engine: flexijax.Engine, prompt: list[int], rows: int, new: int) -> list[list[int]]:
    """The tokens of each row, without a server."""
    sampling = flexijax.Sampling(ignore_eos=True)
    streams = [engine.submit(prompt, max_new_tokens=new, sampling=sampling) for _ in range(rows)]
    return [[token.id for token in stream.tokens] for stream in streams if stream.result()]


def busy(boundaries: Connection) -> None:
    """A process that takes so many seconds of processor time whenever it is sent a number."""
    with contextlib.suppress(EOFError):
        while True:
            seconds = boundaries.recv()
            until = time.process_time() + seconds
            while time.process_time() < until:
                pass


@contextlib.contextmanager
def beside() -> Iterator[Callable[[float], object]]:
    """What has another process take so many seconds of processor time, without waiting for it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=busy, args=(theirs,))
    process.start()
    theirs.close()
    yield ours.send
    ours.close()
    process.join()


def client(url: str, prompt: list[int], rows: int, new: int, answers: Any) -> None:
    """Streams all rows at once; in a process of its own, so that its time is not the server's.

    Answers with the tokens, and seconds of processor time for an event of every row.
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
        self.engine, self.service = engine, Service(lm, engine, Settings(names=("m",)))
        self.server = Server(self.service, Transport())
        self.thread = threading.Thread(target=self.server.run, args=([socket],))
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        # As flexijax serve does.
        gc.collect()
        gc.freeze()
        gc.collect()
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def close(self) -> None:
        """Waits for its end."""
        self.server.end()
        self.thread.join()
        gc.unfreeze()

    def cpu_s(self) -> float:
        """Processor seconds of the event loop's thread."""
        assert self.thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self.thread.ident))

    def answer(self, prompt: list[int], rows: int, new: int) -> tuple[list[list[int]], float]:
        """The client's tokens, and its seconds for an event of every row."""
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        process = context.Process(target=client, args=(self.url, prompt, rows, new, answers))
        process.start()
        found = answers.get()
        process.join()
        return found

    def measure(
        self,
        prompt: list[int],
        rows: int,
        new: int,
        *,
        client_s: float = 0.0,
        near: Callable[[float], object] = lambda _: None,
    ) -> dict[str, Any]:
        """All turns of one decode; milliseconds of the loop for a served step; tokens.

        near: called with client_s at each boundary of the chunks beside the client.
        """
        loop_s, steps, before = 0.0, 0, ("", 0.0)

        def boundary(kind: str) -> None:
            nonlocal loop_s, steps, before
            last, before = before, (kind, self.cpu_s())
            if last[0] == "served":
                loop_s += before[1] - last[1]
                steps += self.engine.boundary_steps
            if kind == "beside":
                near(client_s)

        thread = self.service.thread
        turns, deliver = Turns(self.engine, rows, boundary), thread.deliver
        thread.deliver = lambda: None if turns.kind in HELD else deliver()
        try:
            tokens, client_s = self.answer(prompt, rows, new)
        finally:
            turns.close()
            thread.deliver = deliver
        return {
            "turns": turns.found,
            "loop_ms": 1e3 * loop_s / max(steps, 1),
            "client_s": client_s,
            "tokens": tokens,
        }


def row_of(runs: Sequence[dict[str, Any]], boundary_steps: int) -> dict[str, Any]:
    """What is shown of all decodes of a policy."""
    turns = [turn for run in runs for turn in run["turns"]]
    row: dict[str, Any] = {"turns": len(turns)}
    row |= {f"{kind}_ms": median(turn[kind] for turn in turns) for kind in ORDERS[0]}
    row |= ratio(turns, "held") | ratio(turns, "beside")
    row["loop_ms"] = median(run["loop_ms"] for run in runs)
    row["loop_share"] = row["loop_ms"] / row["held_ms"]
    row["client_ms"] = median(1e3 * run["client_s"] / boundary_steps for run in runs)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return_freed_memory()
    use_compilation_cache()
    lm = flexijax.load("smollm2")
    assert lm.tokenizer is not None
    prompt = (lm.tokenizer.encode("The quick brown fox jumps over the lazy dog. ") * 1000)[
        : args.prompt_tokens
    ]
    rows: dict[str, dict[str, Any]] = {}
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
        expected = alone(engine, prompt, args.rows, args.new_tokens)
        served, runs = Served(lm, engine), []
        with contextlib.closing(served), beside() as near:
            client_s = served.measure(prompt, args.rows, 2 * CHUNK)["client_s"]
            for turn in range(args.rounds):
                ask = (prompt, args.rows, args.new_tokens)
                runs.append(served.measure(*ask, client_s=client_s, near=near))
                if runs[-1]["tokens"] != expected:
                    print("tokens differ: nothing is reported", file=sys.stderr)
                    return 1
                rows[policy] = {"policy": policy, "rows": args.rows}
                rows[policy] |= row_of(runs, engine.boundary_steps)
                found = [rows[policy][name] for name in ("to_held", "to_beside", "turns")]
                print(f"{policy}, round {turn + 1}: {found}", file=sys.stderr, flush=True)
                results.write(args.json, "serving_overhead", args, rows=list(rows.values()))
    print(table(list(rows.values()), COLUMNS))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serving_overhead", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and environment")
    parser.add_argument("--policies", nargs="+", default=["full", "flexi"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=400)
    parser.add_argument("--max-context", type=int, help="of the engine (what they take)")
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
