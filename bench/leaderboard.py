"""Every cache method at several budgets, on the same documents: `python -m bench.leaderboard`.

    python -m bench.leaderboard --policies all --budgets 256 512 1024 --data TASK.jsonl ...

Each document is read once and its cache committed once for each method and budget; all are fed full
attention's own greedy answer, see `bench.closeness`, whose options and records these are. `--quick`
is one document, 512 tokens of it and 16 steps. Bytes are of a request of --max-tokens and --steps:
steady_mb all that its cache has on the device, what policies remember of tokens and tables among
it; peak_mb that and what stands beside it while a prompt is read, one layer of it and a hidden
state for each token; host_mb its pages there. A budget that a method cannot do with is left out,
and named.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import results
from bench.closeness import add_options, evaluations, parse
from bench.timing import table
from flexijax import policies
from flexijax.cache.memory import cache_bytes
from flexijax.cache.prefill_kv import prefill_bytes
from flexijax.cli.terminal import use_compilation_cache
from flexijax.config import CacheConfig
from flexijax.engine.plan import make_program, token_bytes
from flexijax.evaluation import Evaluation
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load

COLUMNS = (
    *("policy", "budget", "kl", "kl_low", "kl_high", "agreement", "best"),
    *("steady_mb", "peak_mb", "host_mb", "evicted_tokens", "documents", "tokens"),
)
QUICK = {"documents": 1, "max_tokens": 512, "steps": 16}


def configs_of(
    lm: LanguageModel, names: Sequence[str], budgets: Sequence[int], args: argparse.Namespace
) -> tuple[dict[str, CacheConfig], dict[str, str]]:
    """(configs, why others are left out) by "policy:budget"; "full" has no budget."""
    configs, without = {}, {}
    for name in policies.names() if "all" in names else names:
        for label in [name] if name == "full" else [f"{name}:{budget}" for budget in budgets]:
            made = parse(label, num_layers=lm.attention.num_layers, profile=args.profile)
            try:
                bytes_of(lm, made, args)
            except ValueError as problem:
                without[label] = str(problem)
            else:
                configs[label] = made
    return configs, without


def bytes_of(lm: LanguageModel, config: CacheConfig, args: argparse.Namespace) -> dict[str, float]:
    """What one request of the longest kind takes, in megabytes: see above."""
    program = make_program(
        lm, config, max_tokens=args.max_tokens + args.steps, max_new_tokens=args.steps
    )
    steady, host = cache_bytes(program.layout, program.policy)
    reading = prefill_bytes(program.prefill_spec(), width=token_bytes(lm))
    found = {"steady": steady, "peak": steady + reading, "host": host}
    return {f"{name}_mb": value / 1e6 for name, value in found.items()}


def rows_of(found: Evaluation, sizes: dict[str, dict[str, float]]) -> list[dict[str, object]]:
    """One row a config, the nearest to full attention first; plain JSON values.

    best: whether none other is as near with as few bytes on the device.
    """
    rows = []
    for one in sorted(found.summary(), key=lambda one: one.kl):
        policy, _, budget = one.config.partition(":")
        row = dataclasses.asdict(one) | sizes[one.config]
        rows.append(row | {"policy": policy, "budget": int(budget) if budget else None})
    for at, row in enumerate(rows):
        row["best"] = all(nearer["steady_mb"] > row["steady_mb"] for nearer in rows[:at])
    return rows


def draw(rows: Sequence[dict], path: Path) -> None:
    """KL against device bytes, a curve for each policy, and a line through the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    # On a logarithmic axis there is no place for what does not diverge.
    shown = sorted((row for row in rows if row["kl"] > 0), key=lambda row: row["steady_mb"])
    for at, name in enumerate(dict.fromkeys(row["policy"] for row in shown)):
        mine = [row for row in shown if row["policy"] == name]
        x, y = [row["steady_mb"] for row in mine], [row["kl"] for row in mine]
        axes.plot(x, y, marker="os^vDP*X"[at % 8], markersize=4, linewidth=0.8, label=name)
    best = [row for row in shown if row["best"]]
    x, y = [row["steady_mb"] for row in best], [row["kl"] for row in best]
    axes.step(x, y, where="post", color="0.7", linewidth=3, zorder=0, label="best")
    axes.set(xscale="log", yscale="log", xlabel="cache on the device, MB, all counted")
    axes.set(ylabel="KL to full, nats a token")
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    use_compilation_cache()
    lm = load(args.model)
    configs, without = configs_of(lm, args.policies, args.budgets, args)
    for label, why in without.items():
        print(f"without {label}: {why}", file=sys.stderr)
    sizes = {label: bytes_of(lm, config, args) for label, config in configs.items()}
    rows: list[dict] = []
    for found in evaluations(lm, configs, args):
        rows = rows_of(found, sizes)
        results.write(args.json, "leaderboard", args, rows=rows, without=without)
        if args.plot is not None:
            draw(rows, args.plot)
    print(table(rows, COLUMNS))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.leaderboard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--policies", nargs="+", default=["all"], metavar="NAME")
    parser.add_argument("--budgets", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--quick", action="store_true", help="little of everything")
    return parser


if __name__ == "__main__":
    sys.exit(main())
