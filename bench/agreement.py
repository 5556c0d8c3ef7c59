"""How close each way of choosing pages stays to full attention: `python -m bench.agreement`.

Every system is fed full attention's own greedy continuation of real documents, token by token, and
its next-token distributions are compared with full attention's: do they agree on the best token,
and what is the Kullback-Leibler divergence from full to the system (nats a token).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.timing import environment, table
from flexijax.cli.terminal import use_compilation_cache
from flexijax.config import SCORES, CacheConfig
from flexijax.engine.continuation import Continuation, read
from flexijax.engine.prefill import Program
from flexijax.generate import make_program
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.policies.base import Flexi, Quest
from flexijax.profiles import lookup
from flexijax.profiles.documents import Document, prompt_ids, read_documents
from flexijax.profiles.records import Records

# The last two are for the scale: every head treated as stable, and pages chosen by age alone.
SYSTEMS = ("flexi", "quest", "all_stable", "sink_recent")
COLUMNS = ("system", "agreement", "kl", "kl_to_quest", "documents", "tokens")


@dataclasses.dataclass(frozen=True)
class Recent:
    """A page score that knows nothing of keys: the newer the better."""

    def empty(self, blocks: int, heads: int, head_dim: int) -> jax.Array:
        """A placeholder for each page."""
        return jnp.zeros((blocks, heads, 1), jnp.int8)

    def empty_state(self, rows: int, heads: int, head_dim: int) -> tuple[()]:
        """Nothing."""
        return ()

    def fit(self, k_pages: jax.Array, length: jax.Array) -> tuple[()]:
        """Nothing."""
        return ()

    def summarize(self, k_pages: jax.Array, state: Any = ()) -> jax.Array:
        """Nothing: zeros [..., 1]."""
        return jnp.zeros((*k_pages.shape[:-2], 1), jnp.int8)

    def scores(
        self,
        q: jax.Array,
        summaries: jax.Array,
        state: Any,
        block_table: jax.Array,
        lengths: jax.Array,
        *,
        page_size: int,
        scale: float,
        implementation: str | None,
    ) -> jax.Array:
        """The page's number as float32[B, K, P], -inf beyond the request."""
        page = jnp.arange(block_table.shape[1], dtype=jnp.float32)[None]
        used = page * page_size < lengths[:, None].astype(jnp.float32)
        scores = jnp.where(used, page, -jnp.inf)[:, None]
        return jnp.broadcast_to(scores, (q.shape[0], q.shape[1], scores.shape[-1]))


def programs(
    lm: LanguageModel, *, score: str, budget_tokens: int, max_tokens: int, profile: str | None
) -> dict[str, Program]:
    """The static part of "full" and of every system, all with caches of one size."""
    found = None if profile is None else lookup.load(profile)
    made = {
        mode: make_program(
            lm,
            CacheConfig(mode=mode, budget_tokens=budget_tokens, score=score),
            profile=found,
            max_tokens=max_tokens,
            rows=1,
        )
        for mode in ("full", "flexi", "quest")
    }
    layers = lm.attention.num_layers
    flexi, quest = made["flexi"].policy, made["quest"].policy
    assert isinstance(flexi, Flexi) and isinstance(quest, Quest)
    made["all_stable"] = dataclasses.replace(
        made["flexi"],
        policy=dataclasses.replace(flexi, unstable=((),) * layers),
        layout=dataclasses.replace(made["flexi"].layout, paged=((),) * layers),
    )
    made["sink_recent"] = dataclasses.replace(
        made["quest"], policy=dataclasses.replace(quest, score=Recent())
    )
    return made


def compare(full: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per token: whether both have the same best one, and KL(full || other) in nats.

    full, other: logits float32[T, V] -> bool[T], float64[T].
    """
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (full, other))
    return full.argmax(-1) == other.argmax(-1), (np.exp(p) * (p - q)).sum(axis=-1)


def measure_document(
    lm: LanguageModel, made: dict[str, Program], document: Document, *, max_tokens: int, steps: int
) -> list[dict[str, Any]]:
    """One row a system: mean agreement and KL over the tokens up to the first stop token.

    made: of `programs`. max_tokens: of the prompt, which is read once for all systems. steps: whole
    chunks of the rerank interval. Empty where the answer is nothing but a stop token.
    """
    assert lm.tokenizer is not None
    prompt = prompt_ids(document, lm.tokenizer, max_tokens=max_tokens)
    reading = read(lm, made["full"], prompt)
    said = Continuation(lm, made["full"], reading).greedy(steps)
    stops = [at for at, token in enumerate(said) if token in lm.tokenizer.stop_ids]
    counted = min(stops, default=steps)
    if not counted:
        return []
    full = Continuation(lm, made["full"], reading).feed(said)
    # Logits after token i say what comes as token i + 1: full's own choice, or the bench is wrong.
    if not np.array_equal(full.argmax(-1)[:-1], np.array(said[1:])):
        raise RuntimeError("full attention, fed its own tokens, does not choose them again")
    rows = []
    for system in SYSTEMS:
        fed = Continuation(lm, made[system], reading)
        same, kl = compare(full[:counted], fed.feed(said)[:counted])
        rows.append(
            {
                "system": system,
                "task": document.task,
                "index": document.index,
                "context": len(prompt),
                "tokens": counted,
                "agreement": float(same.mean()),
                "kl": float(kl.mean()),
                "promoted": fed.promoted,
            }
        )
    return rows


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every document weighing the same: one row a system."""
    found = []
    for system in SYSTEMS:
        mine = [row for row in rows if row["system"] == system]
        quest = [row["kl"] for row in rows if row["system"] == "quest"]
        kl = float(np.mean([row["kl"] for row in mine]))
        found.append(
            {
                "system": system,
                "agreement": float(np.mean([row["agreement"] for row in mine])),
                "kl": kl,
                "kl_to_quest": kl / float(np.mean(quest)),
                "documents": len(mine),
                "tokens": sum(row["tokens"] for row in mine),
            }
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    use_compilation_cache()
    lm = load(args.model)
    room = args.max_tokens + args.steps
    made = programs(
        lm,
        score=args.score,
        budget_tokens=args.budget_tokens,
        max_tokens=room,
        profile=args.profile,
    )
    documents = [one for path in args.data for one in read_documents(path, limit=args.documents)]
    settings = [args.max_tokens, args.steps, args.budget_tokens, repr(made["flexi"].policy)]
    records, rows = Records(args.records), []
    for at, document in enumerate(documents):
        key = [lm.fingerprint, lm.name, document.text, document.instruction, *settings]
        found = records.get(*key)
        if found is None:
            found = measure_document(
                lm, made, document, max_tokens=args.max_tokens, steps=args.steps
            )
            records.add(*key, value=found)
        rows += found
        shown = " ".join(f"{row['system']} {row['agreement']:.2f} {row['kl']:.3f}" for row in found)
        name = f"{document.task}[{document.index}]"
        print(f"{at + 1} of {len(documents)} {name}: {shown}", file=sys.stderr, flush=True)
    if not rows:
        print("every answer was nothing but a stop token", file=sys.stderr)
        return 1
    if args.json is not None:
        content = {"rows": means(rows), "documents": rows, "environment": environment(threads=2)}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(table(means(rows), COLUMNS))
    return 0


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--records", type=Path, metavar="FILE", help="finished documents: go on")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--profile", help="name or file; default: the shipped one of the model")
    parser.add_argument("--score", choices=SCORES, default=CacheConfig().score, help="of pages")
    parser.add_argument("--documents", type=int, default=1, help="of each file")
    parser.add_argument("--max-tokens", type=int, default=5600, help="of a prompt")
    parser.add_argument(
        "--steps", type=int, default=48, help="tokens compared a document, a multiple of 16"
    )
    parser.add_argument("--budget-tokens", type=int, default=1024)
    return parser


if __name__ == "__main__":
    sys.exit(main())
