"""Several questions about each document: `python -m bench.prefix --data TASK.jsonl ...`.

The first question of a document reads all of it, the others take over its blocks. Reported are the
times to the first token, and how many of all prompt tokens were computed. No number is shown unless
answers were the same, to the bit, as those of an engine that shares nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flexijax
from bench import results
from bench.timing import median, table
from flexijax.cli.terminal import return_freed_memory, use_compilation_cache
from flexijax.profiles.documents import read_documents

QUESTIONS = (
    "What is the main point of the text above?",
    "Who is it about?",
    "Which numbers does it give?",
    "What happened first?",
    "What is recommended at the end?",
    "Which organisations are named?",
    "What remains open?",
    "Summarize it in one sentence.",
)
SAMPLING = flexijax.Sampling(ignore_eos=True, logprobs=True)


def prompts_of(
    lm: flexijax.LanguageModel,
    files: Sequence[Path],
    *,
    documents: int,
    shortest: int,
    longest: int,
) -> list[list[list[int]]]:
    """Of each document its prompts, one a question; documents are cut to the longest.

    Raises ValueError where the files have fewer documents of at least `shortest` tokens.
    """
    assert lm.tokenizer is not None
    found: list[list[list[int]]] = []
    for one in (one for path in files for one in read_documents(path)):
        if len(found) == documents:
            break
        tokens = lm.tokenizer.encode(one.text)[:longest]
        if len(tokens) >= shortest:
            asked = (lm.tokenizer.encode(f"\n\nQuestion: {text}\nAnswer:") for text in QUESTIONS)
            found.append([tokens + list(question) for question in asked])
    if len(found) < documents:
        raise ValueError(f"{len(found)} documents of {shortest} tokens, wanted {documents}")
    return found


def ask(
    engine: flexijax.Engine, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[flexijax.Generation]:
    """The answers to prompts that come one after the other."""
    return [
        engine.submit(prompt, max_new_tokens=new_tokens, sampling=SAMPLING).result()
        for prompt in prompts
    ]


def same(one: flexijax.Generation, other: flexijax.Generation) -> bool:
    """Whether two answers are equal to the bit."""
    return one.token_ids == other.token_ids and one.logprobs == other.logprobs


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return_freed_memory()
    use_compilation_cache()
    lm = flexijax.load("smollm2")
    shortest, longest = args.document_tokens
    prompts = prompts_of(
        lm, args.data, documents=args.documents, shortest=shortest, longest=longest
    )
    prompts = [of_document[: args.questions] for of_document in prompts]
    context = max(len(prompt) for of_document in prompts for prompt in of_document)
    sizes: dict[str, Any] = {
        "cache": flexijax.CacheConfig(policy=args.policy, budget_tokens=args.budget_tokens),
        "max_requests": 1,
        "max_context": context + args.new_tokens,
    }
    engine = flexijax.Engine(lm, **sizes)
    engine.compile()
    answers = []
    for of_document in prompts:
        answers.append(ask(engine, of_document, args.new_tokens))
        print(f"{len(answers)} of {len(prompts)} documents", file=sys.stderr, flush=True)
    checked = [*range(1, min(args.check, len(prompts[0]) - 1) + 1)]
    alone = ask(
        flexijax.Engine(lm, prefix_caching=False, **sizes),
        [prompts[0][at] for at in checked],
        args.new_tokens,
    )
    if not all(same(answers[0][at], one) for at, one in zip(checked, alone, strict=True)):
        print("answers differ from those without sharing: nothing is reported", file=sys.stderr)
        return 1
    row = summary(prompts, answers) | {"policy": args.policy, "checked": len(checked)}
    columns = ("policy", "miss_s", "hit_s", "hit_to_miss", "computed", "checked")
    print(table([row], columns))
    results.write(args.json, "prefix", args, rows=[row])
    return 0


def summary(
    prompts: Sequence[Sequence[Sequence[int]]], answers: Sequence[Sequence[flexijax.Generation]]
) -> dict[str, Any]:
    """Medians of seconds to the first token of misses and hits; the share of tokens computed."""
    tokens = sum(len(prompt) for of_document in prompts for prompt in of_document)
    metrics = [one.metrics for of_document in answers for one in of_document]
    miss = median(one.ttft_s for one in metrics if not one.cached_tokens)
    hits = [one.ttft_s for one in metrics if one.cached_tokens]
    hit = median(hits)
    return {
        "miss_s": miss,
        "hit_s": hit,
        "hit_to_miss": hit / miss,
        "hits": len(hits),
        "computed": 1 - sum(one.cached_tokens for one in metrics) / tokens,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write rows and environment")
    parser.add_argument("--policy", default="flexi")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--document-tokens", type=int, nargs=2, default=[5000, 6000])
    parser.add_argument("--questions", type=int, default=len(QUESTIONS), help="of each document")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--budget-tokens", type=int, default=1024)
    parser.add_argument("--check", type=int, default=1, help="answers compared with no sharing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
