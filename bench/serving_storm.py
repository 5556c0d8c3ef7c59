"""A crowd that behaves badly: `python -m bench.serving_storm`, with `--quick` for a first look.

`flexijax serve` first answers some requests one after the other. Then hundreds of connections are
open at once, some of which ask those again; others stop reading, are killed, send half a request, a
malformed one or one that is too long, or hold a connection idle. After each such round the first
requests are asked again, and memory, open files and threads of the server are counted. In the
middle of a last round it gets SIGTERM. The exit code is 1 where a text differs, a request is
refused without a reason or not answered at all, or something is left behind. Linux only.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.served import Served, served
from bench.storm_clients import Client, Crowd
from bench.storm_wire import Asked, Wire, content_of
from bench.timing import table

COLUMNS = (
    *("when", "rss_mb", "peak_mb", "files", "threads", "idle_share", "answers", "texts", "faults"),
    "slowest_health_s",
)
# What rounds after the first may add to the memory; of a core, what a server may take that has
# nothing to do.
_GROWTH_MB, _IDLE_SHARE = 32.0, 0.01
_WORDS = ("river", "stone", "letter", "seven", "garden", "winter", "engine", "quiet")


def requests(count: int, new_tokens: int, *, seed: int) -> list[Asked]:
    """Different ones: greedy and sampled, completions and chats, of several lengths."""
    draw, made = random.Random(seed), []
    for at in range(count):
        said = f"{at}. " + " ".join(draw.choices(_WORDS, k=2 + 3 * (at % 4)))
        body: dict[str, Any] = {"max_tokens": new_tokens - at % 5, "ignore_eos": True}
        body |= {"return_token_ids": True, "temperature": 0.8 * (at % 2), "seed": at}
        if at % 3:
            made.append(Asked("/v1/completions", body | {"prompt": said}))
        else:
            chat = [{"role": "user", "content": said}]
            made.append(Asked("/v1/chat/completions", body | {"messages": chat}))
    return made


async def quiet(url: str, asked: Sequence[Asked]) -> list[Asked]:
    """With the answers that each gets alone."""
    made = []
    for one in asked:
        async with await Wire.open(url) as wire:
            await wire.send(one.raw())
            status, _, body = await wire.whole()
        if status != 200:
            raise RuntimeError(f"a quiet server answers {status}: {body[:300]!r}")
        ids, text = content_of(json.loads(body)["choices"][0])
        made.append(dataclasses.replace(one, ids=tuple(ids), text=text))
    return made


async def storm(
    server: Served, crowd: Crowd, seconds: float, *, end_after: float | None = None
) -> dict[str, Any]:
    """Until all clients have left; end_after: seconds after which the server is told to end."""
    slowest, peak, ended_s = 0.0, 0.0, None

    async def watch() -> None:
        nonlocal slowest, peak
        while True:
            started = time.monotonic()
            with contextlib.suppress(OSError, EOFError):
                async with await Wire.open(server.url) as wire:
                    await wire.send(b"GET /health HTTP/1.1\r\nHost: storm\r\n\r\n")
                    await wire.whole()
                slowest = max(slowest, time.monotonic() - started)
            peak = max(peak, usage(server.pid).get("rss_mb", 0.0))
            await asyncio.sleep(0.5)

    async def end() -> None:
        nonlocal ended_s
        assert end_after is not None
        await asyncio.sleep(end_after)
        crowd.ending, started = True, time.monotonic()
        server.end()
        await asyncio.to_thread(server.wait, 120)
        ended_s = time.monotonic() - started

    tasks = [asyncio.ensure_future(watch())]
    ending = None if end_after is None else asyncio.ensure_future(end())
    await crowd.run(seconds)
    if ending is not None:
        await ending
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "answers": sum(crowd.seen.values()),
        "texts": sum(count for name, count in crowd.seen.items() if ": 200" in name),
        "faults": len(crowd.faults),
        "slowest_health_s": slowest,
        "peak_mb": peak,
        "ended_s": ended_s,
    }


def usage(pid: int) -> dict[str, float]:
    """Resident megabytes, open files and threads of a process; nothing of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return {}
    found = dict(line.split(":", 1) for line in status.splitlines())
    if "VmRSS" not in found:
        return {}
    resident = int(found["VmRSS"].split()[0]) * 1024 / 1e6
    return {"rss_mb": resident, "files": files, "threads": int(found["Threads"])}


def idle(pid: int, seconds: float) -> dict[str, float]:
    """`usage` after so long without a request, and the share of a core that was taken meanwhile."""

    def taken() -> float:
        # The program's name, which may hold spaces, ends with the only bracket.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    # The last connections are just being closed.
    time.sleep(1)
    before = taken()
    time.sleep(seconds)
    return usage(pid) | {"idle_share": (taken() - before) / seconds}


def settled(url: str, seconds: float = 60.0) -> str | None:
    """Waits until the engine holds nothing; what it still holds after so long."""
    until, held = time.monotonic() + seconds, ["nothing is known"]
    while held and time.monotonic() < until:
        time.sleep(0.5)
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        names = [f"flexijax:num_requests_{of}{{" for of in ("waiting", "reading", "running")]
        names += ["flexijax:num_requests_paused{", "flexijax:blocks_used{"]
        held = [line for line in lines if line.startswith(tuple(names)) and float(line.split()[-1])]
    return "; ".join(held) or None


def left_behind(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What goes on, or grew; the first round may still bring what is kept from then on."""
    before, *_, last = rows
    found = [
        f"{name}: {before[name]:.0f} before and {last[name]:.0f} after"
        for name, more in (("files", 0), ("threads", 4))
        if last[name] > before[name] + more
    ]
    if last["idle_share"] > _IDLE_SHARE:
        found.append(f"with nothing to do it takes {last['idle_share']:.1%} of a core")
    if len(rows) > 2 and last["rss_mb"] > rows[1]["rss_mb"] + _GROWTH_MB:
        found.append(f"memory: {rows[1]['rss_mb']:.0f} MB, then {last['rss_mb']:.0f} MB")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        args.connections, args.seconds, args.rounds, args.stall = 60, 4.0, 1, 2.0
        args.shutdown_timeout, args.idle = 3.0, 2.0
    options = ["--model", args.model, "--max-model-len", str(args.max_model_len)]
    options += ["--max-waiting", str(args.max_waiting), "--policy", args.policy]
    options += ["--shutdown-timeout", str(args.shutdown_timeout)]
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    seen: dict[str, int] = {}
    with served(options, threads=args.threads) as server:
        asked = asyncio.run(quiet(server.url, requests(12, args.new_tokens, seed=args.seed)))
        rows.append({"when": "before"} | idle(server.pid, args.idle))
        for turn in range(args.rounds + 1):
            last = turn == args.rounds
            crowd = _crowd(args, server.url, asked, turn)
            seconds, end_after = args.seconds, None
            if last:
                seconds, end_after = args.seconds / 2, args.seconds / 4
            row = asyncio.run(storm(server, crowd, seconds, end_after=end_after))
            row["when"] = "ended" if last else f"round {turn + 1}"
            if not last:
                if asyncio.run(quiet(server.url, asked)) != asked:
                    faults.append(f"round {turn + 1}: afterwards, texts are others than before")
                if held := settled(server.url):
                    faults.append(f"round {turn + 1}: the engine still holds {held}")
                row |= idle(server.pid, args.idle)
            rows.append(row)
            faults += [f"{row['when']}: {fault}" for fault in crowd.faults]
            for name, count in crowd.seen.items():
                seen[name] = seen.get(name, 0) + count
            print(f"{row['when']}: {row['answers']} answers", file=sys.stderr, flush=True)
            _write(args, rows, seen, faults)
        try:
            code = server.wait(10)
        except subprocess.TimeoutExpired:
            code = None
    if code != 0:
        faults.append(f"after SIGTERM the server's exit code is {code}: {server.lines[-5:]}")
    faults += left_behind(rows[:-1])
    _write(args, rows, seen, faults)
    print(table(rows, COLUMNS))
    print("\n".join(f"{count:6} {name}" for name, count in sorted(seen.items())))
    print(f"ended {rows[-1]['ended_s']:.1f} s after SIGTERM; {len(faults)} faults")
    for fault in faults[:40]:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _write(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    seen: dict[str, int],
    faults: list[str],
) -> None:
    """The JSON as far as it has come, so that an interrupted run is not lost."""
    results.write(args.json, "serving_storm", args, rows=rows, seen=seen, faults=faults)


def _crowd(args: argparse.Namespace, url: str, asked: list[Asked], turn: int) -> Crowd:
    clients = [
        Client(
            url=url,
            asked=asked,
            draw=random.Random(f"{args.seed} {turn} {at}"),
            stall_s=args.stall,
            oversized=args.max_model_len,
        )
        for at in range(args.connections)
    ]
    return Crowd(clients, patience_s=args.patience)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.serving_storm", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few connections, some seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--policy", default="flexi")
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=2, help="before SIGTERM")
    parser.add_argument("--stall", type=float, default=40.0, help="at most, s")
    parser.add_argument("--idle", type=float, default=10.0, help="watched after a round, s")
    parser.add_argument("--patience", type=float, default=120.0, help="for an answer, s")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-waiting", type=int, default=32)
    parser.add_argument("--shutdown-timeout", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
