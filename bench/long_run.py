"""Hundreds of different calls in one process: `python -m bench.long_run`.

Lengths, batches, budgets, policies, intervals and sampling are drawn at random, so that most calls
compile programs of their own at first, and later ones find some of them gone. What a process may
not collect without end is counted after every call: memory, memory maps, executables, threads, open
files. Ends with 1 where one of them has not levelled off: where the last third of the calls reached
more than 1.2 times what the middle third did. The model is small and random, since what is looked
for is what a call leaves behind.
"""

import argparse
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

import flexijax
from bench import results
from bench.timing import table
from flexijax.engine.jit_cache import memory_maps, num_compiled
from flexijax.models.config import ModelConfig
from flexijax.models.decoder import Decoder
from flexijax.models.language_model import LanguageModel, from_config

CONFIG = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=2048,
    rope_theta=10000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)
COUNTED = ("memory_mb", "maps", "executables", "threads", "files")
# Growth within this is the noise of an allocator and of what happens to be cached.
LEVEL = 1.2


def one_call(lm: LanguageModel, profile: flexijax.HeadProfile, draw: random.Random) -> int:
    """Generates with everything drawn; the tokens that came."""
    longest = draw.choice([8, 60, 500])
    lengths = [draw.randint(1, longest) for _ in range(draw.choice([1, 2, 4]))]
    policy = draw.choice(flexijax.policies.names())
    cache = flexijax.CacheConfig(
        policy=policy,
        budget_tokens=draw.choice([96, 256]),
        rerank_interval="adaptive" if policy == "flexi" and draw.random() < 0.3 else 16,
        profile=profile,
    )
    results = flexijax.generate(
        lm,
        [[draw.randrange(512) for _ in range(length)] for length in lengths],
        max_new_tokens=draw.choice([1, 40]),
        cache=cache,
        sampling=flexijax.Sampling(temperature=draw.choice([0.0, 0.8]), seed=1),
        max_batch=draw.choice([None, 1]),
    )
    return sum(len(result.token_ids) for result in results)


def counts() -> dict[str, float]:
    """What this process holds now; 0 where the system does not tell."""
    found: dict[str, float] = dict.fromkeys(COUNTED, 0)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        found["memory_mb"] = int(status.split("VmRSS:")[1].split()[0]) / 1000
        found["threads"] = int(status.split("Threads:")[1].split()[0])
        found["files"] = len(list(Path("/proc/self/fd").iterdir()))
    except OSError:
        found["threads"] = threading.active_count()
    return found | {"maps": memory_maps(), "executables": num_compiled()}


def not_level(rows: Sequence[dict[str, float]]) -> list[str]:
    """What grew from the middle third of the calls to the last."""
    third = len(rows) // 3
    middle, last = rows[third : 2 * third], rows[2 * third :]
    return [
        name
        for name in COUNTED
        if third and max(r[name] for r in last) > LEVEL * max(r[name] for r in middle) + 1
    ]


def run(calls: int, *, seed: int = 0, every: int = 10) -> list[dict[str, float]]:
    """One row a call; some are shown while it goes on."""
    params = Decoder(CONFIG).init(jax.random.key(0), dtype=jnp.float32)
    dtype = jnp.dtype("float32")
    lm = from_config(CONFIG, params, name="small", dtype=dtype, tokenizer=None)
    profile = flexijax.HeadProfile(
        model="small",
        num_layers=CONFIG.num_layers,
        num_kv_heads=CONFIG.num_kv_heads,
        unstable=((0, 1),),
        page_size=16,
        budget_pages=4,
        source="by hand",
    )
    draw, rows = random.Random(seed), []
    for call in range(1, calls + 1):
        started = time.perf_counter()
        tokens = one_call(lm, profile, draw)
        took = time.perf_counter() - started
        rows.append({"call": call, **counts(), "tokens": tokens, "seconds": took})
        if call % every == 0 or call == calls:
            print(table(rows[-1:], tuple(rows[-1])), file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.long_run", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a row a call")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="6 calls")
    args = parser.parse_args(argv)
    rows = run(6 if args.quick else args.calls, seed=args.seed)
    third = max(len(rows) // 3, 1)
    thirds = [rows[:third], rows[third : 2 * third] or rows[:third], rows[2 * third :]]
    summary = [
        {"at most in": f"calls {part[0]['call']:.0f} to {part[-1]['call']:.0f}"}
        | {name: max(row[name] for row in part) for name in COUNTED}
        for part in thirds
    ]
    results.write(args.json, "long_run", args, rows=rows)
    print(table(summary, tuple(summary[0])))
    grew = [] if args.quick else not_level(rows)
    print(f"still growing: {', '.join(grew)}" if grew else "everything has levelled off")
    return 1 if grew else 0


if __name__ == "__main__":
    sys.exit(main())
