"""What the engine would do on a GPU that is not here: `python -m bench.simulate`. A prediction.

    python -m bench.simulate --json simulate.json --plot simulate.png

The engine's own code plans, admits, grows, pauses and reads, on a clock of its own; what runs on
the device takes predicted seconds, from bytes, launches and instructions of the very programs,
compiled for that GPU. `--counts` are files of `flexijax compile-report --json FILE`, for each
policy two of one batch and different contexts; the first policy is what the others are compared
with, at equal memory. Two workloads, prompts of --prompt-tokens each:

- offline: all are there from the start, each gets --new-tokens; prompts are read first;
- online: they arrive at random at --rates a second, and get as many tokens as between --answers.

Then each assumption is changed by --factors, for fewer requests, and the first two policies are
compared again. Nothing here was measured on a GPU.
"""

import argparse
import dataclasses
import functools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.simulate_engine import Asked
from bench.simulate_machine import Counted, Machine, counted
from bench.simulate_times import Assumptions
from bench.timing import table
from flexijax.models import presets
from flexijax.profiles.records import Records

COUNTS, SHIPPED = Path(__file__).parent / "counts", ("full", "flexi")
PREDICTED = "Prediction, not measured"
# Takbir et al., FlexiCache: the talk, and the abstract of arXiv:2511.00868; against vLLM 0.8.2.
PUBLISHED = {
    "offline": "up to 1.97 (talk), 1.38 to 1.55 (abstract)",
    "online": "up to 2.1 (talk), 1.6 to 2.1 (abstract)",
}
COLUMNS = (
    *("workload", "config", "new_tokens", "rate", "rows", "device_gb", "host_gb", "running"),
    *("tokens_per_s", "tpot_ms", "ttft_s", "reading_s", "decoding_s", "predicted_ratio"),
    "published",
)
CHANGED = ("assumption", "value", "factor", "offline_ratio", "online_ratio")
QUICK: dict[str, Any] = {
    "requests": 6,
    "online_requests": 6,
    "new_tokens": [32],
    "rates": [0.5],
    "answers": [8, 32],
    "factors": [0.8],
    "changed_requests": 3,
}


def offline(args: argparse.Namespace, requests: int, new_tokens: int) -> list[Asked]:
    """All at once."""
    draw = random.Random(args.seed)
    return [Asked(0.0, draw.randint(*args.prompt_tokens), new_tokens) for _ in range(requests)]


def online(args: argparse.Namespace, requests: int, rate: float) -> list[Asked]:
    """One after the other, `rate` a second; prompts and answers the same for every rate."""
    draw, now, made = random.Random(args.seed), 0.0, []
    for _ in range(requests):
        now += draw.expovariate(1.0) / rate
        made.append(Asked(now, draw.randint(*args.prompt_tokens), draw.randint(*args.answers)))
    return made


def compared(rows: Sequence[dict[str, Any]], workload: str) -> list[dict[str, Any]]:
    """Each with how many times as good as the first it is: more tokens a second, or less time."""
    first = rows[0]
    for row in rows:
        name = "tokens_per_s" if workload == "offline" else "tpot_ms"
        better = row[name] / first[name] if workload == "offline" else first[name] / row[name]
        row |= {"workload": workload, "predicted_ratio": better, "published": None}
        if row is not first:
            row["published"] = PUBLISHED[workload]
    return list(rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    policies = counted(args.counts)
    name = policies[0].reports[0]["model"]
    machine = Machine(
        presets.config(name), name, args.device_gb * 1e9, args.host_gb * 1e9, Assumptions()
    )
    rows: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    write = functools.partial(_write, args, machine.assumptions, rows, changed)
    known = Records(args.records)
    for new_tokens in args.new_tokens:
        asked = offline(args, args.requests, new_tokens)
        found = [machine.run(of, asked, prefill_first=True, known=known) for of in policies]
        named = zip(found, policies, strict=True)
        found = [{"config": of.name, "new_tokens": new_tokens, **one} for one, of in named]
        rows += compared(found, "offline")
        write()
    for rate in args.rates:
        asked = online(args, args.online_requests, rate)
        found = [machine.run(of, asked, prefill_first=False, known=known) for of in policies]
        named = zip(found, policies, strict=True)
        rows += compared([{"config": of.name, "rate": rate, **one} for one, of in named], "online")
        write()
    for change in sensitivity(args, machine, policies, known):
        changed.append(change)
        write()
    print(f"{PREDICTED}\n\n{table(rows, COLUMNS)}\n\n{table(changed, CHANGED)}")
    if args.plot is not None:
        draw(rows, args.plot)
    return 0


def sensitivity(
    args: argparse.Namespace, machine: Machine, policies: Sequence[Counted], known: Records
) -> Iterator[dict[str, Any]]:
    """The ratios of the second policy to the first, one assumption changed at a time."""
    base, other = policies[0], policies[1]
    changes: list[tuple[str | None, float]] = [(None, 1.0)]
    names = [field.name for field in dataclasses.fields(Assumptions)]
    changes += [(name, factor) for name in names for factor in args.factors]
    new_tokens, rate = args.new_tokens[-1], args.rates[-1]
    for name, factor in changes:
        of = machine.assumptions if name is None else machine.assumptions.changed(name, factor)
        changed = dataclasses.replace(machine, assumptions=of)
        row = {"assumption": name or "as they are", "factor": factor}
        row["value"] = None if name is None else getattr(of, name)
        for workload, asked in (
            ("offline", offline(args, args.changed_requests, new_tokens)),
            ("online", online(args, args.changed_requests, rate)),
        ):
            first = workload == "offline"
            pair = [
                changed.run(one, asked, prefill_first=first, known=known) for one in (base, other)
            ]
            row[f"{workload}_ratio"] = compared(pair, workload)[1]["predicted_ratio"]
        yield row


def _write(
    args: argparse.Namespace,
    assumptions: Assumptions,
    rows: list[dict[str, Any]],
    changed: list[dict[str, Any]],
) -> None:
    results.write(
        args.json,
        "simulate",
        args,
        caption=PREDICTED,
        rows=rows,
        sensitivity=changed,
        assumptions=dataclasses.asdict(assumptions),
    )


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens a second against the answer's length, and time between tokens against the rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    sides = (
        ("offline", "new_tokens", "tokens_per_s", "new tokens of each request", "tokens a second"),
        ("online", "rate", "tpot_ms", "requests a second", "ms between tokens, mean"),
    )
    for at, (workload, x, y, x_label, y_label) in enumerate(sides):
        axes = figure.add_subplot(1, 2, at + 1)
        mine = [row for row in rows if row["workload"] == workload]
        for name in dict.fromkeys(row["config"] for row in mine):
            of = [row for row in mine if row["config"] == name]
            axes.plot([row[x] for row in of], [row[y] for row in of], marker="o", label=name)
        axes.set(xlabel=x_label, ylabel=y_label, title=f"{workload}: predicted", ylim=(0, None))
        axes.legend(fontsize=8)
    figure.suptitle(f"{PREDICTED}; published against vLLM: " + "; ".join(PUBLISHED.values()))
    figure.savefig(path, dpi=120)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shipped = [COUNTS / f"{name}-{of}.json" for name in SHIPPED for of in (16384, 32768)]
    parser.add_argument("--counts", type=Path, nargs="+", default=shipped, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png or .svg")
    parser.add_argument("--records", type=Path, metavar="FILE", help="of finished runs")
    parser.add_argument("--requests", type=int, default=500, help="offline")
    parser.add_argument("--online-requests", type=int, default=150)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[29000, 31000])
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[50, 250, 500, 1000, 1500])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.4, 0.6])
    parser.add_argument("--answers", type=int, nargs=2, default=[50, 1500], metavar="TOKENS")
    parser.add_argument("--device-gb", type=float, default=94, help="weights among it")
    parser.add_argument("--host-gb", type=float, default=180)
    parser.add_argument("--factors", type=float, nargs="*", default=[0.8, 1.2])
    parser.add_argument("--changed-requests", type=int, default=120, help="of each changed run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser


if __name__ == "__main__":
    sys.exit(main())
