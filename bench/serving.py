"""Requests at given rates: `python -m bench.serving --data TASK.jsonl ...`.

`flexijax serve` gets the same bytes of device memory for each policy. Prompts of real text arrive
as a Poisson process, at the same moments for all policies, through OpenAI's own client, and stream.
Reported are the times to the first token, the times per token after it and to the end, at several
percentiles, and generated tokens a second. No number is shown unless every request got all of its
tokens, and the first prompt those that it gets alone.
"""

import argparse
import asyncio
import dataclasses
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.served import served
from bench.throughput import prompts_of
from bench.timing import interleaved, table

PERCENTILES = (50, 95, 99)
COLUMNS = (
    *("policy", "rate", "requests", "tokens_per_s", "ttft_p50_s", "ttft_p95_s", "ttft_p99_s"),
    *("tpot_p50_ms", "tpot_p95_ms", "tpot_p99_ms", "e2e_p50_s", "e2e_p95_s", "e2e_p99_s"),
)


@dataclasses.dataclass(frozen=True)
class Timed:
    """One request. due, first, last: seconds since the run began. tokens: that it got."""

    due: float
    first: float
    last: float
    tokens: int
    text: str

    @property
    def tpot_s(self) -> float:
        """Per token after the first."""
        return (self.last - self.first) / max(self.tokens - 1, 1)


def arrivals(count: int, rate: float, *, seed: int) -> list[float]:
    """Moments of a Poisson process, in seconds; rate: requests a second."""
    draw, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        found.append(now)
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, as NumPy's default. Raises ValueError for none."""
    if not values:
        raise ValueError("values must not be empty")
    ordered, at = sorted(values), percent / 100 * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


async def ask(
    client: Any, prompt: list[int], new_tokens: int, *, since: float, due: float
) -> Timed:
    """Sends a prompt when it is due, and follows its stream to the end."""
    await asyncio.sleep(max(0.0, since + due - time.perf_counter()))
    stream = await client.completions.create(
        model="served",
        prompt=prompt,
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    first = last = None
    pieces, tokens = [], 0
    async for event in stream:
        if event.choices and event.choices[0].token_ids:
            last = time.perf_counter() - since
            first = last if first is None else first
            pieces.append(event.choices[0].text)
        if event.usage is not None:
            tokens = event.usage.completion_tokens
    if first is None or last is None:
        raise RuntimeError("a stream ended without a token")
    return Timed(due, first, last, tokens, "".join(pieces))


async def run(
    url: str, prompts: list[list[int]], new_tokens: int, moments: Sequence[float]
) -> list[Timed]:
    """All prompts, each at its moment."""
    import openai

    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=None
    ) as client:
        since = time.perf_counter()
        each = zip(prompts, moments, strict=True)
        return await asyncio.gather(
            *(ask(client, prompt, new_tokens, since=since, due=due) for prompt, due in each)
        )


def summary(runs: Sequence[Sequence[Timed]]) -> dict[str, float]:
    """Percentiles over all runs, and tokens a second from first arrivals to last tokens."""
    timed = [one for of_run in runs for one in of_run]
    row: dict[str, float] = {"requests": len(timed)}
    seconds = sum(max(one.last for one in of) - min(one.due for one in of) for of in runs)
    row["tokens_per_s"] = sum(one.tokens for one in timed) / seconds
    measured = {
        ("ttft", "s"): [one.first - one.due for one in timed],
        ("tpot", "ms"): [1e3 * one.tpot_s for one in timed],
        ("e2e", "s"): [one.last - one.due for one in timed],
    }
    for (name, unit), values in measured.items():
        for percent in PERCENTILES:
            row[f"{name}_p{percent}_{unit}"] = percentile(values, percent)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    shortest, longest = args.prompt_tokens
    prompts = prompts_of(args.data, count=args.requests, shortest=shortest, longest=longest)
    random.Random(args.seed).shuffle(prompts)
    runs: dict[tuple[str, float], list[list[Timed]]] = {}
    for turn, policy in interleaved(args.policies, rounds=args.rounds):
        options = ["--model", args.model, "--served-model-name", "served", "--policy", policy]
        options += ["--budget-tokens", str(args.budget_tokens), "--device-bytes", args.device_bytes]
        options += ["--max-model-len", str(args.max_model_len or longest + args.new_tokens)]
        options += ["--max-num-seqs", str(args.max_requests), "--max-waiting", str(args.requests)]
        # Each prompt comes once at each rate, and is read each time.
        options += ["--no-enable-prefix-caching"]
        with served(options, threads=args.threads) as server:
            [alone] = asyncio.run(run(server.url, prompts[:1], args.new_tokens, [0.0]))
            for rate in args.rates:
                moments = arrivals(len(prompts), rate, seed=args.seed + turn)
                timed = asyncio.run(run(server.url, prompts, args.new_tokens, moments))
                if wrong := faults(timed, alone, args.new_tokens):
                    print(f"{policy} at {rate} a second: {wrong}: no numbers", file=sys.stderr)
                    return 1
                runs.setdefault((policy, rate), []).append(timed)
                print(f"round {turn + 1}: {policy}, {rate} a second", file=sys.stderr, flush=True)
                results.write(args.json, "serving", args, rows=_rows(runs))
    print(table(_rows(runs), COLUMNS))
    return 0


def faults(timed: Sequence[Timed], alone: Timed, new_tokens: int) -> str | None:
    """What is wrong with the answers of a run, if anything is."""
    short = sum(one.tokens != new_tokens for one in timed)
    if short:
        return f"{short} requests got fewer tokens than {new_tokens}"
    if timed[0].text != alone.text:
        return "the first prompt's text is another one than alone"
    return None


def _rows(runs: dict[tuple[str, float], list[list[Timed]]]) -> list[dict[str, Any]]:
    rows = [{"policy": policy, "rate": rate} | summary(of) for (policy, rate), of in runs.items()]
    return sorted(rows, key=lambda row: row["rate"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and environment")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policies", nargs="+", default=["full", "flexi"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="a second")
    parser.add_argument("--requests", type=int, default=20, help="at each rate")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[3000, 4000])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device-bytes", default="1GiB", help="for each policy's engine")
    parser.add_argument("--max-model-len", type=int, help="of each server (what prompts take)")
    parser.add_argument("--max-requests", type=int, default=8)
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
