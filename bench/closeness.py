"""How close cache methods, page scores and budgets stay to full attention: `bench.closeness`.

    python -m bench.closeness --data TASK.jsonl ... --documents 5 --configs flexi quest:minmax:512

Every config is fed full attention's own greedy answer to real documents, see `flexijax.evaluate`. A
config is a method, then in any order a page score, a budget in tokens, and how it is reranked:
"flexi", "h2o:512", "flexi:sketch2:1024", "quest:minmax8", "flexi:interval=32", "flexi:adaptive",
"flexi:adaptive=0.6/0.3" (the RCO that doubles an interval, and the RCO that halves it), or what
pages are kept in: "flexi:device=int4:host=int4". Two more methods give the scale: "all_stable",
flexi without unstable heads, and "recent", the first and the newest pages alone. Scores are those
of `bench.score_candidates`.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from bench import results
from bench.score_candidates import CANDIDATES
from bench.timing import table
from flexijax import policies
from flexijax.cli.terminal import Progress, use_compilation_cache
from flexijax.config import CacheConfig
from flexijax.evaluate import evaluate
from flexijax.evaluation import ConfigSummary, Evaluation
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.pallas_kernels.queries import HeadQueries
from flexijax.policies.adaptive import Adaptive
from flexijax.policies.base import Policy
from flexijax.policies.flexi import Flexi
from flexijax.policies.page_score import PageScore, PageShape, PageTable, update_by_summaries
from flexijax.policies.quest import Quest
from flexijax.profiles.documents import read_documents

CONFIGS = ("full", "quest", "flexi", "streaming_llm", "snapkv", "h2o")
COLUMNS = (
    *("config", "kl", "kl_low", "kl_high", "ratio", "ratio_low", "ratio_high", "worst_task_ratio"),
    *("agreement", "device_mb", "summary_mb", "host_mb", "promoted_per_step", "mean_interval"),
    *("rco", "evicted_tokens", "documents", "tokens"),
)
_ALL_STABLE, _RECENT = "all_stable", "recent"
_FORM = "METHOD[:SCORE][:TOKENS][:interval=STEPS|:adaptive[=HIGH/LOW]][:device=CODEC][:host=CODEC]"


@dataclasses.dataclass(frozen=True)
class Recent:
    """A page score that knows nothing of keys: the newer the better."""

    @property
    def fit_tokens(self) -> int | None:
        """Nothing is fitted: see `PageScore`."""
        return 0

    def empty(self, blocks: int, heads: int, page: PageShape) -> jax.Array:
        """A placeholder for each page: see `PageScore`."""
        return jnp.zeros((blocks, heads, 1), jnp.int8)

    def empty_state(self, rows: int, heads: int, page: PageShape) -> tuple[()]:
        """Nothing: see `PageScore`."""
        return ()

    def fit(self, k_pages: jax.Array, length: jax.Array) -> tuple[()]:
        """Nothing: see `PageScore`."""
        return ()

    def summarize(self, k_pages: jax.Array, state: object = ()) -> jax.Array:
        """Zeros [..., 1]: see `PageScore`."""
        return jnp.zeros((*k_pages.shape[:-2], 1), jnp.int8)

    update = update_by_summaries

    def scores(
        self,
        q: jax.Array | HeadQueries,
        summaries: jax.Array,
        state: object,
        table: PageTable,
        *,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """The page's number: see `PageScore`."""
        page = jnp.arange(table.blocks.shape[1], dtype=jnp.float32)[None]
        known = page * table.page_size < table.summarized[:, None].astype(jnp.float32)
        scores = jnp.where(known, page, -jnp.inf)[:, None, None]
        return jnp.broadcast_to(scores, (*q.shape[:2], *scores.shape[2:]))


def parse(name: str, *, num_layers: int, profile: str | None = None) -> CacheConfig:
    """The config of a name. Raises ValueError where it is of another form, or names nothing."""
    method, *parts = name.split(":")
    config = CacheConfig(profile=profile)
    score = None
    for part in parts:
        if part.isdigit():
            config = dataclasses.replace(config, budget_tokens=int(part))
        elif found := re.fullmatch(r"interval=(\d+)", part):
            config = dataclasses.replace(config, rerank_interval=int(found[1]))
        elif found := re.fullmatch(r"adaptive(?:=([\d.]+)/([\d.]+))?", part):
            pace = Adaptive()
            if found[1]:
                pace = Adaptive(lengthen_at=float(found[1]), shorten_at=float(found[2]))
            config = dataclasses.replace(config, rerank_interval=pace)
        elif found := re.fullmatch(r"(device|host)=(\w+)", part):
            config = dataclasses.replace(config, **{f"{found[1]}_codec": found[2]})
        elif part in CANDIDATES:
            score = CANDIDATES[part]
        else:
            listed = ", ".join(CANDIDATES)
            raise ValueError(f"{name!r} must be {_FORM}, and a score one of {listed}")
    if score is not None and method not in ("flexi", "quest", _ALL_STABLE):
        raise ValueError(f"{name!r}: the method {method!r} scores no pages")
    return dataclasses.replace(config, policy=_policy(method, num_layers, score))


def _policy(method: str, num_layers: int, score: PageScore | None) -> Policy:
    if method == _RECENT:
        return Quest(score=Recent())
    made = Flexi(unstable=((),) * num_layers) if method == _ALL_STABLE else None
    made = policies.find(method) if made is None else made
    if score is not None and isinstance(made, Flexi | Quest):
        made = dataclasses.replace(made, score=score)
    return made


def rows_of(found: Evaluation, base: str | None) -> list[dict[str, object]]:
    """The summary as plain JSON values, bytes in megabytes too."""
    rows = []
    for one in found.summary(base if any(row.config == base for row in found.rows) else None):
        row = dataclasses.asdict(one)
        row |= {f"{tier}_mb": row[f"{tier}_bytes"] / 1e6 for tier in ("device", "summary", "host")}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.base is not None and args.base not in args.configs:
        raise SystemExit(f"--base {args.base} must be one of --configs")
    use_compilation_cache()
    lm = load(args.model)
    layers = lm.attention.num_layers
    configs = {name: parse(name, num_layers=layers, profile=args.profile) for name in args.configs}
    found = Evaluation(())
    for found in evaluations(lm, configs, args):
        _write(args, found)
    print(table(rows_of(found, args.base), COLUMNS))
    return 0


def evaluations(
    lm: LanguageModel, configs: dict[str, CacheConfig], args: argparse.Namespace
) -> Iterator[Evaluation]:
    """What has been found after each document of `args.data`, of `add_options`.

    One document of every file in turn, so that what is there early speaks for all of them.
    """
    found, progress = Evaluation(()), Progress()
    waiting = [iter(read_documents(path)) for path in args.data]
    for _ in range(args.documents):
        for documents in waiting:
            for document in documents:
                new = evaluate(
                    lm,
                    [document],
                    configs,
                    max_tokens=args.max_tokens,
                    steps=args.steps,
                    records=args.records,
                    progress=progress,
                )
                # Where full attention answers with nothing, the next document takes its place.
                if new.rows:
                    found = Evaluation((*found.rows, *new.rows))
                    yield found
                    break


def _write(args: argparse.Namespace, found: Evaluation) -> None:
    """The JSON and the picture as far as they have come."""
    rows = rows_of(found, args.base)
    results.write(args.json, "closeness", args, rows=rows, documents=found.rows)
    if args.plot is not None:
        draw(found.summary(), args.plot)


def draw(rows: Sequence[ConfigSummary], path: Path) -> None:
    """KL against device bytes, a curve for each method and score, a point for each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curves: dict[str, list[ConfigSummary]] = {}
    for row in rows:
        # On a logarithmic axis there is no place for what does not diverge.
        if row.kl > 0:
            curves.setdefault(_curve(row.config), []).append(row)
    for at, (name, mine) in enumerate(curves.items()):
        mine.sort(key=lambda row: row.device_bytes)
        x, y = [row.device_bytes / 1e6 for row in mine], [row.kl for row in mine]
        error = [[row.kl - row.kl_low for row in mine], [row.kl_high - row.kl for row in mine]]
        marker = "o" if name.startswith("flexi") else "s"
        axes.errorbar(x, y, yerr=error, marker=marker, capsize=2, label=name)
        # Curves take turns with the side of their labels, since some lie close to each other.
        offset, side = ((5, 4), "left") if at % 2 == 0 else ((-5, -9), "right")
        for row, place in zip(mine, zip(x, y, strict=True), strict=True):
            budget = str(_budget(row.config))
            axes.annotate(budget, place, offset, textcoords="offset points", ha=side, fontsize=7)
    axes.margins(x=0.1)
    axes.set(yscale="log", xlabel="KV bytes on the device, MB", ylabel="KL to full, nats a token")
    axes.set_title("Closeness to full attention; numbers are budgets in tokens", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _curve(name: str) -> str:
    """The name without its budget: points of one curve differ in nothing else."""
    return ", ".join(part for part in name.split(":") if not part.isdigit())


def _budget(name: str) -> int:
    return next((int(part) for part in name.split(":") if part.isdigit()), 1024)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is read, how much of it, and where what is found goes."""
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--records", type=Path, metavar="FILE", help="of finished documents")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png or .svg")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--profile", help="name or file; default: the shipped one of the model")
    parser.add_argument("--documents", type=int, default=1, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=5600, help="of a prompt")
    parser.add_argument("--steps", type=int, default=64, help="longest answer, tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.closeness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--base", metavar="NAME", help="whose divergence the ratios are to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
