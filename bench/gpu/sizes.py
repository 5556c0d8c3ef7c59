"""How large everything is: production shapes, and tiny ones for a CPU."""

from __future__ import annotations

import dataclasses

from flexijax.models import presets
from flexijax.models.config import ModelConfig

_SMALL = ModelConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=2048,
    num_layers=4,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_context=32768,
    rope_theta=10000.0,
    rope_scaling=None,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of all parts.

    batch, pages, budget_pages, heads, group, width, page, dtype: B, P, K, KV heads, G, H, tokens of
    a page and dtype of what kernels are given. chunk: query tokens of prefill attention.
    copy_bytes: of the array whose copy is timed. big_bytes: what a pool has to pass, on a machine
    with room for it. trips: round trips between the tiers. calls, rounds: of a timed program, and
    how often; sets: of arguments that take turns, so that no cache holds them.
    small: the model whose tokens are compared; prompts: the lengths of its prompts; long_prompts:
    of those that use up a budget of `small_budget_pages`. large: the model that is timed, `name`d,
    with `large_batch` requests of `large_context` tokens, new ones included, of which `chunks`
    chunks of steps are timed; prompt_batch: of the cache into which a prompt that was read is
    committed.
    """

    batch: int = 16
    pages: int = 2048
    budget_pages: int = 64
    heads: int = 8
    group: int = 4
    width: int = 128
    page: int = 16
    dtype: str = "bfloat16"
    chunk: int = 1024
    copy_bytes: int = 1 << 30
    big_bytes: int = 1 << 32
    trips: int = 100
    calls: int = 20
    rounds: int = 7
    sets: int = 3
    small: ModelConfig = _SMALL
    prompts: tuple[int, ...] = (1000, 777, 33)
    long_prompts: tuple[int, ...] = (1000, 777, 33)
    small_budget_pages: int = 8
    name: str = "llama-3.1-8b"
    large: ModelConfig = presets.config("llama-3.1-8b")  # noqa: RUF009
    large_batch: int = 16
    large_context: int = 32768
    chunks: int = 20
    prompt_batch: int = 1

    @property
    def slots(self) -> int:
        """Slots of an offloaded head: the budget, and the page that begins before a rerank."""
        return self.budget_pages + 1


# What takes seconds on a CPU is compiling: one layer that has heads of both kinds, and programs
# that several parts share.
_TINY = dataclasses.replace(
    _SMALL,
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_context=512,
)

FULL = Sizes()
QUICK = Sizes(
    batch=4,
    pages=16,
    budget_pages=8,
    heads=2,
    group=2,
    width=32,
    dtype="float32",
    chunk=32,
    copy_bytes=1 << 16,
    big_bytes=1 << 14,
    trips=3,
    calls=2,
    rounds=2,
    sets=1,
    small=_TINY,
    prompts=(61, 45),
    long_prompts=(150, 131),
    small_budget_pages=8,
    name="tiny",
    large=_TINY,
    large_batch=2,
    large_context=256,
    chunks=2,
    prompt_batch=2,
)
