"""How close each page score keeps the model to full attention: `python -m bench.score`.

Every system, a mode with a score and a budget, is fed full attention's own greedy continuation of
real documents, token by token. Compared are the next-token distributions: do they agree on the best
token, and what is the Kullback-Leibler divergence from full to the system (nats a token). A prompt
is read once for all systems, and a document that is in the records file is not measured again.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.agreement import compare
from bench.score_candidates import named
from bench.timing import environment, table
from flexijax.cache.memory import request_bytes, state_bytes, summary_bytes
from flexijax.cli.terminal import use_compilation_cache
from flexijax.config import CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.prefill import Program
from flexijax.generate import make_program
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.policies.base import Flexi, Quest
from flexijax.profiles import lookup
from flexijax.profiles.documents import Document, prompt_ids, read_documents
from flexijax.profiles.head_profile import HeadProfile
from flexijax.profiles.records import Records
from flexijax.profiles.staleness import HeadStability, fit

SYSTEMS = (
    *(f"flexi:{score}:1024" for score in ("minmax16", "minmax8", "sketch1", "sketch2", "sketch4")),
    *(f"quest:{score}:1024" for score in ("minmax16", "minmax8", "sketch1", "sketch2", "sketch4")),
    *(
        f"flexi:{score}:{tokens}"
        for score in ("minmax16", "sketch2")
        for tokens in (256, 512, 2048)
    ),
)
# What every other system of the same mode and budget is divided by.
BASE = "minmax16"
COLUMNS = (
    "system",
    "kl",
    "kl_low",
    "kl_high",
    "ratio",
    "ratio_high",
    "agreement",
    "worst_task_ratio",
    "page_bytes",
    "state_bytes",
    "device_mb",
    "promoted",
    "rco",
    "documents",
)
_DRAWS = 10_000


def programs(
    lm: LanguageModel, systems: Sequence[str], *, max_tokens: int, profile: str | None
) -> dict[str, Program]:
    """The static part of "full" and of every system, all with caches of one size."""
    found = None if profile is None else lookup.load(profile)

    def made(mode: str, budget: int) -> Program:
        cache = CacheConfig(mode=mode, budget_tokens=budget)
        return make_program(lm, cache, profile=found, max_tokens=max_tokens, rows=1)

    result = {"full": made("full", 1024)}
    for system in systems:
        mode, score, budget = split(system)
        program = made(mode, budget)
        assert isinstance(program.policy, Flexi | Quest)
        policy = dataclasses.replace(program.policy, score=named(program.layout.page_size)[score])
        result[system] = dataclasses.replace(program, policy=policy)
    return result


def split(system: str) -> tuple[str, str, int]:
    """ "flexi:sketch2:1024" -> ("flexi", "sketch2", 1024); ValueError where that is no system."""
    parts = system.split(":")
    if len(parts) != 3 or parts[0] not in ("flexi", "quest") or not parts[2].isdigit():
        raise ValueError(f"--systems {system!r} must be flexi or quest:score:budget in tokens")
    if parts[1] not in named(16):
        raise ValueError(f"--systems {system!r}: the score must be one of {', '.join(named(16))}")
    return parts[0], parts[1], int(parts[2])


def measure_document(
    lm: LanguageModel,
    made: dict[str, Program],
    prompt: Sequence[int],
    *,
    steps: int,
    profile: HeadProfile | None = None,
) -> Iterator[dict[str, Any]]:
    """One row a system: mean agreement and KL over the tokens up to full's first stop token.

    profile: whose promised stability is compared with what the stable heads show.
    """
    reading = read(lm, made["full"], prompt)
    said = Continuation(lm, made["full"], reading).greedy(steps)
    stop_ids = lm.tokenizer.stop_ids if lm.tokenizer is not None else ()
    counted = min((at for at, token in enumerate(said) if token in stop_ids), default=steps)
    if not counted:
        return
    full = Continuation(lm, made["full"], reading).feed(said)
    # Logits after token i say what comes as token i + 1: full's own choice, or the bench is wrong.
    if not np.array_equal(full.argmax(-1)[:-1], np.array(said[1:])):
        raise RuntimeError("full attention, fed its own tokens, does not choose them again")
    for system, program in made.items():
        if system == "full":
            continue
        fed = Continuation(lm, program, reading)
        same, kl = compare(full[:counted], fed.feed(said)[:counted])
        layout, policy = program.layout, program.policy
        seen = _stability(fed)
        described = None
        if profile is not None:
            described = fit(
                profile,
                seen,
                page_size=profile.page_size,
                budget_pages=profile.budget_pages,
                score=_score_of(profile),
            )
        yield {
            "system": system,
            "context": len(prompt),
            "tokens": counted,
            "agreement": float(same.mean()),
            "kl": float(kl.mean()),
            "promoted": fed.promoted,
            "rco": float(np.mean([one.rco for one in seen])) if seen else None,
            "profile_difference": None if described is None else described.difference,
            "page_bytes": summary_bytes(layout, policy),
            "state_bytes": state_bytes(layout, policy),
            "device_bytes": request_bytes(layout, policy, len(prompt))[0],
        }


def _score_of(profile: HeadProfile) -> str:
    """What it was measured with: how far other scores are from it is one of the questions here."""
    return str(profile.measured.get("score", "minmax"))


def _stability(fed: Continuation) -> list[HeadStability]:
    """What was seen of the slotted heads: nothing where none is reranked."""
    layout, found = fed.program.layout, []
    for layer, counted in enumerate(fed.cache.counters.heads):
        if counted is None:
            continue
        for at, head in enumerate(layout.slotted(layer)):
            reranks, choices = int(counted.reranks[0, at]), int(counted.choices[0, at])
            if choices:
                rco = float(counted.rco[0, at]) / choices
                interval = int(fed.cache.counters.reranks[0]) * fed.program.rerank_interval
                found.append(HeadStability(layer, head, rco, interval / reranks, choices))
    return found


def summary(rows: Sequence[dict[str, Any]], systems: Sequence[str]) -> list[dict[str, Any]]:
    """One row a system: means over documents with 95 % intervals from resampling documents.

    ratio: of mean KL to that of `BASE` in the same mode at the same budget on the same documents.
    """
    kls = {
        system: {(r["task"], r["index"]): r["kl"] for r in rows if r["system"] == system}
        for system in systems
    }
    found = []
    for system in systems:
        mine = [row for row in rows if row["system"] == system]
        if not mine:
            continue
        mode, _, budget = split(system)
        base = kls.get(f"{mode}:{BASE}:{budget}", {})
        shared = sorted(key for key in kls[system] if key in base)
        row: dict[str, Any] = {"system": system, "documents": len(mine)}
        for name in ("kl", "agreement"):
            values = np.array([one[name] for one in mine])
            low, high = interval(values, np.ones_like(values))
            row |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
        if shared:
            over = np.array([kls[system][key] for key in shared])
            under = np.array([base[key] for key in shared])
            row["ratio"] = float(over.mean() / under.mean())
            row["ratio_low"], row["ratio_high"] = interval(over, under)
            tasks = {
                task: float(
                    np.mean([kls[system][key] for key in shared if key[0] == task])
                    / np.mean([base[key] for key in shared if key[0] == task])
                )
                for task, _ in shared
            }
            row["task_ratios"], row["worst_task_ratio"] = tasks, max(tasks.values())
        for name in ("rco", "profile_difference", "promoted"):
            known = [one[name] for one in mine if one.get(name) is not None]
            row[name] = float(np.mean(known)) if known else None
        row |= {name: mine[0].get(name) for name in ("page_bytes", "state_bytes")}
        row["device_mb"] = float(np.mean([one["device_bytes"] for one in mine])) / 1e6
        found.append(row)
    return found


def interval(over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval over documents of mean(over) / mean(under), pairs kept together."""
    draws = np.random.default_rng(0).integers(0, len(over), (_DRAWS, len(over)))
    low, high = np.quantile(over[draws].mean(1) / under[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against device bytes, a curve for each mode and score, a point for each budget."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curves = sorted({split(row["system"])[:2] for row in rows})
    for at, (mode, score) in enumerate(curves):
        mine = sorted(
            (row for row in rows if split(row["system"])[:2] == (mode, score)),
            key=lambda row: row["device_mb"],
        )
        x, y = [row["device_mb"] for row in mine], [row["kl"] for row in mine]
        error = [
            [row["kl"] - row["kl_low"] for row in mine],
            [row["kl_high"] - row["kl"] for row in mine],
        ]
        marker = "o" if mode == "flexi" else "s"
        axes.errorbar(x, y, yerr=error, marker=marker, capsize=2, label=f"{mode}, {score}")
        # Curves take turns with the side of their labels, since some lie close to each other.
        offset, side = ((5, 4), "left") if at % 2 == 0 else ((-5, -9), "right")
        for row in mine:
            axes.annotate(
                str(split(row["system"])[2]),
                (row["device_mb"], row["kl"]),
                offset,
                textcoords="offset points",
                ha=side,
                fontsize=7,
            )
    axes.margins(x=0.1)
    axes.set(yscale="log", xlabel="KV bytes on the device, MB", ylabel="KL to full, nats a token")
    axes.set_title("Closeness to full attention; numbers are budgets in tokens", fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    use_compilation_cache()
    lm = load(args.model)
    if lm.tokenizer is None:
        raise ValueError(f"--model {args.model} has no tokenizer, so it cannot read documents")
    systems = list(dict.fromkeys(args.systems))
    made = programs(lm, systems, max_tokens=args.max_tokens + args.steps, profile=args.profile)
    profile = lookup.find(lm, 64) if args.profile is None else lookup.load(args.profile)
    records = Records(args.records)
    rows: list[dict[str, Any]] = []
    waiting = [iter(read_documents(path)) for path in args.data]
    # One document of every file in turn, so that what is there early speaks for all of them.
    for _ in range(args.documents):
        for documents in waiting:
            for document in documents:
                mine = _measured(lm, made, profile, document, records, args)
                if mine:
                    rows += mine
                    _write(args, rows, systems)
                    break
    print(table(summary(rows, systems), COLUMNS))
    return 0


def _measured(
    lm: LanguageModel,
    made: dict[str, Program],
    profile: HeadProfile | None,
    document: Document,
    records: Records,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A document's rows, recorded or new; none where full attention answers with nothing."""
    assert lm.tokenizer is not None
    key = [lm.fingerprint, lm.name, document.text, document.instruction]
    key += [args.profile, args.max_tokens, args.steps]
    if records.get(*key, "full") == "no answer":
        return []
    # The shipped profile may come to name other heads, which is another system.
    systems = {
        system: (system, getattr(program.policy, "unstable", None))
        for system, program in made.items()
        if system != "full"
    }
    missing = [system for system, name in systems.items() if records.get(*key, *name) is None]
    if missing:
        prompt = prompt_ids(document, lm.tokenizer, max_tokens=args.max_tokens)
        some = {name: made[name] for name in ("full", *missing)}
        answered = False
        for row in measure_document(lm, some, prompt, steps=args.steps, profile=profile):
            answered = True
            records.add(*key, *systems[row["system"]], value=row)
            said = f"{row['system']} {row['agreement']:.2f} {row['kl']:.4f}"
            print(f"{document.task}[{document.index}]: {said}", file=sys.stderr, flush=True)
        if not answered:
            records.add(*key, "full", value="no answer")
            return []
    place = {"task": document.task, "index": document.index}
    found = [records.get(*key, *name) for name in systems.values()]
    return [{**place, **row} for row in found if row is not None]


def _write(args: argparse.Namespace, rows: list[dict[str, Any]], systems: list[str]) -> None:
    found = summary(rows, systems)
    if args.json is not None:
        content = {"rows": found, "documents": rows, "environment": environment(threads=2)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(found, args.plot)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.score", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--records", type=Path, metavar="FILE", help="of finished documents")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, .png or .svg")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--profile", help="name or file; default: the shipped one of the model")
    parser.add_argument("--documents", type=int, default=1, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=5600, help="of a prompt")
    parser.add_argument("--steps", type=int, default=64, help="tokens compared, a multiple of 16")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, metavar="MODE:SCORE:TOKENS")
    return parser


if __name__ == "__main__":
    sys.exit(main())
