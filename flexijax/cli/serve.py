"""`flexijax serve`: a server that speaks OpenAI's API, with the cache of your choice."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import logging
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from flexijax.cli.cache_options import add_cache_options, cache_config
from flexijax.cli.terminal import (
    Progress,
    check_writable,
    compiled_folder,
    environment,
    write_json,
)
from flexijax.config import DTYPES
from flexijax.engine.engine import Engine
from flexijax.engine.sampling import Sampling
from flexijax.models.language_model import LanguageModel
from flexijax.models.load import load
from flexijax.profiles import lookup
from flexijax.profiling.choose import AUTO

NAME = "serve"
HELP = "answer OpenAI's API over HTTP, many requests at once"
# What is imported, and the package that has it.
_NEEDS = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
    "openai": "openai",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command; those that vLLM has are named and meant as there."""
    parser.add_argument(
        "--model", required=True, help="smollm2, a Hugging Face folder or hub id, or a .gguf file"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    _add_server(parser.add_argument_group("server").add_argument)
    _add_engine(parser.add_argument_group("engine").add_argument)
    add_cache_options(parser)
    cache = parser.add_argument_group("cache, for this command")
    cache.add_argument(
        "--profile", help="unstable heads: a shipped profile's name or a JSON file (the shipped)"
    )


def _add_server(add) -> None:
    add("--host", default="127.0.0.1", help="(%(default)s: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="(%(default)s)")
    add("--api-key", metavar="KEY", help="asked of all but /health (FLEXIJAX_API_KEY)")
    add("--served-model-name", nargs="+", metavar="NAME", help="the first is shown (the model's)")
    add("--chat-template", metavar="FILE", help="a Jinja template, or a file of one")
    add(
        "--allowed-origins",
        type=json.loads,
        default=[],
        metavar="JSON",
        help='of pages whose scripts may ask, such as ["https://example.com"] (none)',
    )
    add("--ssl-keyfile", type=Path, metavar="FILE")
    add("--ssl-certfile", type=Path, metavar="FILE")
    add("--max-waiting", type=int, default=256, metavar="N", help="requests in line (%(default)s)")
    add(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that requests may go on after SIGTERM (%(default)s)",
    )
    add("--stream-interval", type=int, metavar="N", help="tokens that come at once (the engine's)")


def _add_engine(add) -> None:
    add(
        "--max-model-len", type=int, metavar="N", help="tokens of the longest request (the model's)"
    )
    add("--max-num-seqs", type=int, default=8, metavar="N", help="that run at once (%(default)s)")
    add("--device-bytes", metavar="SIZE", help='for the device\'s tier, such as "1GiB"')
    add("--host-bytes", metavar="SIZE", help="for the host's tier")
    add(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts that begin alike share what they begin with",
    )
    add("--seed", type=int, metavar="N", help="of requests that name none (anew each time)")
    add(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="devices, each with some KV heads (%(default)s)",
    )
    add(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="refused: prompts are read in chunks whose sizes depend on the prompt alone",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to end; bad input raises ValueError or OSError before that."""
    missing = [name for found, name in _NEEDS.items() if importlib.util.find_spec(found) is None]
    if missing:
        raise ValueError(f"needs {', '.join(missing)}: pip install 'flexijax[serve]'")
    # Not before: every other command does without these packages.
    from flexijax.server.service import Service, Settings
    from flexijax.server.serving import Server, Transport, bind

    _check(args)
    profile = args.profile if args.profile is None else lookup.load(args.profile)
    cache = cache_config(args, profile=profile)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        level=logging.WARNING if args.quiet else logging.INFO,
    )
    for noisy in ("jax", "uvicorn", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with contextlib.closing(bind(args.host, args.port)) as socket:
        progress = Progress(quiet=args.quiet)
        lm = _model(args, progress)
        engine = Engine(
            lm,
            cache=cache,
            max_requests=args.max_num_seqs,
            max_context=args.max_model_len,
            device_bytes=args.device_bytes,
            host_bytes=args.host_bytes,
            prefix_caching=args.enable_prefix_caching,
            progress=progress,
            mesh=_mesh(args.tensor_parallel_size),
        )
        _check_engine(args, engine)
        if not args.quiet:
            where = compiled_folder() or "no folder, and compiled each time"
            told = f"the first start compiles for minutes; programs are kept in {where}"
            print(told, file=sys.stderr, flush=True)
        # OpenAI's requests sample where they say nothing; filters are compiled when one asks.
        engine.compile(Sampling(temperature=1.0))
        progress.close()
        settings = Settings(
            names=tuple(args.served_model_name or [args.model]),
            api_key=args.api_key or os.environ.get("FLEXIJAX_API_KEY") or None,
            allowed_origins=tuple(args.allowed_origins),
            max_waiting=args.max_waiting,
            max_body=max(4 << 20, 32 * engine.max_context),
            seed=args.seed,
        )

        def started() -> None:
            scheme = "http" if args.ssl_certfile is None else "https"
            told = f"{settings.names[0]} on {scheme}://{args.host}:{socket.getsockname()[1]}: "
            told += f"{engine.max_requests} at once, {engine.max_context} tokens each"
            if not args.quiet:
                print(told, file=sys.stderr, flush=True)

        transport = Transport(
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            shutdown_timeout=args.shutdown_timeout,
            started=started,
        )
        # Programs and what made them stay. A collection that looks at all of it each time holds up
        # every thread, and comes so seldom that much waits for it.
        gc.collect()
        gc.freeze()
        # Else the next one waits until a quarter as much as that has come.
        gc.collect()
        Server(Service(lm, engine, settings), transport).run([socket])
    if args.json is not None:
        write_json(args.json, {"totals": engine.totals, "environment": environment()})
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot be followed, and says why."""
    if not 1 <= args.tensor_parallel_size <= len(jax.devices()):
        raise ValueError(
            f"--tensor-parallel-size={args.tensor_parallel_size} must be 1 to {len(jax.devices())},"
            " the devices that are here"
        )
    if args.max_num_batched_tokens is not None:
        raise ValueError(
            f"--max-num-batched-tokens={args.max_num_batched_tokens}: prompts are read one after "
            "the other, in chunks whose sizes depend on the prompt alone, for at most half of the "
            "time while anything decodes; there is nothing to set"
        )
    if args.profile == AUTO:
        raise ValueError("--profile=auto measures on one prompt: `flexijax profile` makes a file")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port={args.port} must be from 0, for a free one, to 65535")
    if (args.ssl_keyfile is None) != (args.ssl_certfile is None):
        raise ValueError("--ssl-keyfile and --ssl-certfile go together")
    origins = args.allowed_origins
    if not isinstance(origins, list) or not all(isinstance(one, str) for one in origins):
        raise ValueError(f"--allowed-origins={origins!r} must be a JSON list of texts")
    for name in ("max_waiting", "shutdown_timeout"):
        if not getattr(args, name) >= 0:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}={getattr(args, name)} must be at least 0")
    if args.json is not None:
        check_writable(args.json)


def _mesh(devices: int) -> Mesh | None:
    """Over the first `devices` of those that are here; None for one."""
    if devices == 1:
        return None
    return Mesh(np.array(jax.devices()[:devices]), ("heads",))


def _check_engine(args: argparse.Namespace, engine: Engine) -> None:
    steps = engine.boundary_steps
    if args.stream_interval not in (None, steps):
        raise ValueError(
            f"--stream-interval={args.stream_interval}: with this policy the engine shows "
            f"{steps} tokens of a request at a time, and nothing in between"
        )


def _model(args: argparse.Namespace, progress: Progress) -> LanguageModel:
    loading = f"loading {args.model}"
    progress(loading, 0, 100)
    lm = load(
        args.model,
        dtype=args.dtype,
        max_context=args.max_model_len,
        progress=lambda share: progress(loading, min(int(100 * share), 99), 100),
    )
    progress(loading, 100, 100)
    if args.chat_template is None:
        return lm
    if lm.tokenizer is None:
        raise ValueError(f"--chat-template: the model {lm.name!r} comes without a tokenizer")
    path, template = Path(args.chat_template), args.chat_template
    if "{" not in template:
        template = path.read_text(encoding="utf-8")
    words = dataclasses.replace(lm.tokenizer, chat_template=template)
    return dataclasses.replace(lm, tokenizer=words)
