"""`flexijax generate`: streams a continuation, then says what it took."""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexijax.cli.cache_options import add_cache_options, cache_config
from flexijax.cli.terminal import (
    Progress,
    check_writable,
    environment,
    megabytes,
    table,
    write_json,
)
from flexijax.compare import compare
from flexijax.config import DTYPES, CacheConfig
from flexijax.engine.sampling import Sampling
from flexijax.generate import generate
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.profiles import lookup
from flexijax.profiles.staleness import ProfileFit
from flexijax.profiling.choose import AUTO
from flexijax.results import Generation, StaleProfileWarning

NAME = "generate"
HELP = "continue a prompt with a model, through the cache of your choice"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", required=True, help="smollm2, a Hugging Face folder or hub id, or a .gguf file"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="- reads standard input")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text; - is standard input")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="shorten the model's own; within its window, a sliding window changes nothing",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="(128)")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="apply the model's chat template (default: only with --system)",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat")

    add_cache_options(parser)
    cache = parser.add_argument_group("cache, for this command")
    cache.add_argument("--cache-dtype", choices=DTYPES)
    cache.add_argument(
        "--profile",
        help="unstable heads: a shipped profile's name, a JSON file, or auto: the shipped one of "
        "the model, else measured on the prompt (default: the shipped one)",
    )
    cache.add_argument(
        "--compare-full", action="store_true", help="run policy full as well and compare"
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--min-p", type=float)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="repeatable")
    sampling.add_argument("--logprobs", action="store_true", help="into the JSON file")
    sampling.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Carries the command out; bad input raises ValueError or OSError before the model loads."""
    named = args.profile not in (None, AUTO)
    profile = lookup.load(args.profile) if named else args.profile
    cache = cache_config(args, profile=profile, dtype=args.cache_dtype)
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        stop=tuple(args.stop),
        logprobs=args.logprobs,
        seed=args.seed,
    )
    if args.max_new_tokens <= 0:
        raise ValueError(f"--max-new-tokens={args.max_new_tokens} must be at least 1")
    if args.chat is False and args.system is not None:
        raise ValueError("--system needs the chat template: leave --no-chat out")
    if args.json is not None:
        check_writable(args.json)
    prompt = _prompt(args)

    progress = Progress(quiet=args.quiet)
    loading = f"loading {args.model}"
    progress(loading, 0, 100)
    lm = load(
        args.model,
        dtype=args.dtype,
        max_context=args.max_context,
        progress=lambda share: progress(loading, min(int(100 * share), 99), 100),
    )
    progress(loading, 100, 100)
    if args.chat or args.system is not None:
        prompt = chat_prompt(lm, prompt, system=args.system)

    notes: list[str] = []
    agreement: dict[str, int] = {}
    console = _Console(progress)

    def show(name: object, piece: str) -> None:
        if name in (0, args.policy):
            console.show(piece)

    caches = {args.policy: cache}
    if args.compare_full:
        caches["full"] = cache.as_full()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StaleProfileWarning)
        common = {"max_new_tokens": args.max_new_tokens, "sampling": sampling}
        if len(caches) > 1:
            made = compare(lm, prompt, caches, stream=show, progress=progress, **common)
            results, agreement = dict(made.answers), made.agreement
        else:
            answers = generate(lm, [prompt], cache=cache, stream=show, progress=progress, **common)
            results = {args.policy: answers[0]}
    notes.extend(str(one.message) for one in caught)
    chosen = agreement.get(args.policy) if args.temperature == 0 else None
    if args.json is not None:
        # Before anything is printed that could fail: a reader that has gone, a full disk.
        write_json(args.json, _content(lm, args.policy, cache, sampling, results, chosen))
    console.flush()
    print(flush=True)
    if args.profile == AUTO and not args.quiet and (origin := results[args.policy].metrics.profile):
        print(f"profile: {origin}", file=sys.stderr)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    if not args.quiet:
        print("\n" + table(report(results, chosen=chosen)))
    return 0


def _content(
    lm: LanguageModel,
    policy: str,
    cache: CacheConfig,
    sampling: Sampling,
    results: dict[str, Generation],
    chosen: int | None,
) -> dict[str, Any]:
    """What --json writes: the answer of the policy, others under their names."""
    others = {name: made for name, made in results.items() if name != policy}
    return {
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        # The profile is with the answer; a policy is best read as it is written.
        "cache": {**vars(cache), "policy": repr(cache.find_policy()), "profile": None},
        "sampling": sampling,
        "environment": environment(),
        **vars(_without_measurements(results[policy])),
        **others,
        **({} if chosen is None else {"full_tokens_chosen": chosen}),
    }


class _Console:
    """The text as it comes, on standard output, between lines of progress on standard error."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._waiting: list[str] = []

    def show(self, piece: str) -> None:
        """The first piece waits for the second: the decode steps are compiled in between, and
        their progress would break into the text. From then on the text itself is the progress."""
        self._waiting.append(piece)
        if len(self._waiting) > 1:
            self.flush()

    def flush(self) -> None:
        """All that waits."""
        self._progress.close()
        self._progress.quiet = True
        print("".join(self._waiting), end="", flush=True)
        self._waiting[:] = [""]


def chat_prompt(lm: LanguageModel, text: str, *, system: str | None) -> str:
    """The text of a chat in which the user says `text`, up to where the answer begins."""
    if lm.tokenizer is None:
        raise ValueError(f"--chat: the model {lm.name!r} comes without a tokenizer")
    first = [] if system is None else [{"role": "system", "content": system}]
    return lm.tokenizer.chat([*first, {"role": "user", "content": text}])


def report(results: dict[str, Generation], *, chosen: int | None = None) -> list[list[str]]:
    """The closing table: a column for each policy, and what they agree on where there are two.

    chosen: how many of the second answer's tokens the first policy would have chosen as well.
    """
    columns = [(policy, made, made.metrics) for policy, made in results.items()]
    rows = [
        ["", *(f"policy {policy}" for policy, *_ in columns)],
        ["prompt tokens", *(f"{m.prompt_tokens:,}" for *_, m in columns)],
        ["new tokens", *(f"{m.new_tokens:,}" for *_, m in columns)],
        ["finished by", *(made.finish_reason for _, made, _ in columns)],
        ["time to first token", *(f"{m.ttft_s:.2f} s" for *_, m in columns)],
        ["time per token", *(f"{m.tpot_ms:.1f} ms" for *_, m in columns)],
        ["compiling", *(f"{m.compile_s:.1f} s" for *_, m in columns)],
        ["KV on the device", *(megabytes(m.device_kv_bytes) for *_, m in columns)],
        ["  of it summaries", *(megabytes(m.summary_bytes) for *_, m in columns)],
        ["KV on the host", *(megabytes(m.host_kv_bytes) for *_, m in columns)],
        ["full KV would take", *(megabytes(m.full_kv_bytes) for *_, m in columns)],
        ["moved to the device", *(megabytes(m.promoted_bytes) for *_, m in columns)],
        ["moved to the host", *(megabytes(m.offloaded_bytes) for *_, m in columns)],
        ["tokens evicted, all heads", *(_count(m.evicted_tokens) for *_, m in columns)],
        ["reranks", *(f"{m.reranks}" for *_, m in columns)],
        ["  pages already there", *(_share(m.mean_overlap) for *_, m in columns)],
        ["  mean RCO (of the profile)", *(_stability(m.profile_fit) for *_, m in columns)],
    ]
    # A profile that another score measured expects nothing of the heads' RCO.
    rows = [row for row in rows if any(row[1:])]
    if len(columns) == 2:
        (_, one, _), (_, other, _) = columns
        pairs = list(zip(one.token_ids, other.token_ids, strict=False))
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        rows.append(["tokens equal from the start", f"{same} of {len(pairs)}", ""])
        if chosen is not None:
            rows.append(["tokens of full that agree", f"{chosen} of {len(other.token_ids)}", ""])
    return rows


def _without_measurements(made: Generation) -> Generation:
    """As it is, but with no more of the profile than tells which heads are unstable."""
    if made.profile is None:
        return made
    return replace(made, profile=replace(made.profile, rco=None, measured={}))


def _stability(found: ProfileFit | None) -> str:
    return "" if found is None else f"{found.observed:.2f} ({found.expected:.2f})"


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _prompt(args: argparse.Namespace) -> str:
    if "-" in (args.prompt, args.prompt_file):
        name, text = "standard input", sys.stdin.read()
    elif args.prompt is not None:
        name, text = "--prompt", args.prompt
    else:
        name = args.prompt_file
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} must be UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{name} holds no text: a prompt needs at least one word")
    return text
