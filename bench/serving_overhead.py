"""What the server adds to a decode step: `python -m bench.serving_overhead`.

Rows of the same prompt decode, once in `flexijax.Engine` by itself and once through `flexijax
serve`'s own classes with a client in another process that streams each of them; rounds take turns.
Reported are the processor time of the event loop for each decode step, as a share of the step, and
the two times a step. No number is shown unless all tokens are the same.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flexijax
from bench import results
from bench.timing import median, table
from flexijax.cli.terminal import return_freed_memory, use_compilation_cache

COLUMNS = ("policy", "rows", "step_ms", "served_step_ms", "loop_ms", "loop_share", "slower")


def alone(engine: flexijax.Engine, prompt: list[int], rows: int, new: int) -> dict[str, Any]:
    """(seconds from the first time that all have a token to the end, tokens)."""
    sampling = flexijax.Sampling(ignore_eos=True)
    streams = [engine.submit(prompt, max_new_tokens=new, sampling=sampling) for _ in range(rows)]
    while not all(stream.tokens for stream in streams):
        engine.step()
    before, started = dataclasses.replace(engine.totals), time.perf_counter()
    while engine.step():
        pass
    seconds = time.perf_counter() - started
    steps = (engine.totals.new_tokens - before.new_tokens) / rows
    return {"step_ms": 1e3 * seconds / steps, "tokens": [s.result().token_ids for s in streams]}


def client(url: str, prompt: list[int], rows: int, new: int, answers: Any) -> None:
    """Streams all rows at once; in a process of its own, so that its time is not the server's."""
    import asyncio

    import openai

    async def one(api: Any) -> list[int]:
        ask = {"ignore_eos": True, "return_token_ids": True}
        stream = await api.completions.create(
            model="m", prompt=prompt, max_tokens=new, temperature=0, stream=True, extra_body=ask
        )
        return [i async for event in stream for i in event.choices[0].token_ids]

    async def everybody() -> list[list[int]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as api:
            return await asyncio.gather(*(one(api) for _ in range(rows)))

    answers.put(asyncio.run(everybody()))


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
        """As `alone`, and the milliseconds of the loop for each step."""
        context = multiprocessing.get_context("spawn")
        answers, totals = context.Queue(), self.engine.totals
        process = context.Process(target=client, args=(self.url, prompt, rows, new, answers))
        first = totals.new_tokens
        process.start()
        # As alone, from when all prompts have been read.
        while self.engine.occupancy().running < rows:
            time.sleep(0.002)
        began, started, loop = totals.new_tokens, time.perf_counter(), self.cpu_s()
        while totals.new_tokens < first + rows * new:
            time.sleep(0.002)
        seconds, spent = time.perf_counter() - started, self.cpu_s() - loop
        steps = (totals.new_tokens - began) / rows
        tokens = answers.get()
        process.join()
        return {"step_ms": 1e3 * seconds / steps, "loop_ms": 1e3 * spent / steps, "tokens": tokens}


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
            max_context=args.prompt_tokens + args.new_tokens,
        )
        engine.compile()
        plain, through = [], []
        for _ in range(args.rounds):
            plain.append(alone(engine, prompt, args.rows, args.new_tokens))
            served = Served(lm, engine)
            through.append(served.measure(prompt, args.rows, args.new_tokens))
            served.close()
            if list(map(list, plain[-1]["tokens"])) != list(map(list, through[-1]["tokens"])):
                print("tokens differ: nothing is reported", file=sys.stderr)
                return 1
        step = median(one["step_ms"] for one in plain)
        served_step = median(one["step_ms"] for one in through)
        loop = median(one["loop_ms"] for one in through)
        row = {"policy": policy, "rows": args.rows, "step_ms": step, "served_step_ms": served_step}
        rows.append(
            row | {"loop_ms": loop, "loop_share": loop / step, "slower": served_step / step}
        )
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
    parser.add_argument("--rounds", type=int, default=3)
    return parser


if __name__ == "__main__":
    sys.exit(main())
