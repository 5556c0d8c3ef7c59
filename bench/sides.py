"""The systems that `bench.compare` compares, and how each is asked: in a process of its own."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import results
from bench.timing import answered, in_fresh_process
from flexijax.profiles import lookup
from flexijax.profiles.head_profile import HeadProfile

# Of PyTorch: system -> kind, see `torch_side.maker`. All others are policies of flexijax.
TORCH = {
    "transformers": "dynamic",
    "transformers_static": "static",
    "torch_flexi": "flexi",
    "torch_flexi_compiled": "flexi_compiled",
    "snapkv_kvpress": "snapkv",
}
SYSTEMS = (*TORCH, "full", "quest", "flexi")
# Those that attend to all tokens, and those that attend to the same pages.
DENSE = ("transformers", "transformers_static", "full")
FLEXI = ("flexi", "torch_flexi", "torch_flexi_compiled")
# Of a page's rank: one product of a query that is rounded the other way. Of a row of logits against
# its norm: what another page at the cut does.
TIE, CLOSE = 1.0, 0.02


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a system at a number of prompts of a number of tokens."""

    system: str
    context: int
    batch: int


@dataclass
class Bench:
    """What all cells share. folder: of what has been measured, which is not measured again.

    fresh: each in a process of its own, else all in this one. gate_context, gate_steps: within the
    budget. fed: steps of an answer.
    """

    folder: Path
    model: str
    profile: str
    budget_tokens: int
    steps: int
    fed: int
    threads: int
    lock: Path | None
    fresh: bool
    gate_context: int
    gate_steps: int
    token_ids: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, args: argparse.Namespace, folder: Path) -> Bench:
        """From a command line."""
        names = ("model", "profile", "budget_tokens", "steps", "fed", "threads", "lock")
        return cls(
            folder,
            **{name: getattr(args, name) for name in names},
            fresh=not args.quick,
            gate_context=min(480, args.budget_tokens // 2),
            gate_steps=min(32, args.steps),
        )

    def run(self, cell: Cell, *, steps: int | None = None, turn: int = 0) -> dict[str, Any]:
        """Measures one cell: see `measure` of either side."""
        return self._ask(cell, {"steps": steps or self.steps}, turn)

    def feed(self, cell: Cell, tokens: list[int]) -> str:
        """The file of the logits before each token: see `feed` of either side."""
        name = hashlib.sha256(repr((cell, tokens, results.commit())).encode()).hexdigest()[:16]
        made = {"call": "feed", "tokens": tokens, "logits": str(self.folder / f"{name}.npy")}
        return self._ask(cell, made)["logits"]

    def pages(self, context: int) -> dict[str, Any]:
        """See `flexijax_side.pages`."""
        spec = {"call": "pages", "steps": 64, "unread": 4, "at_most": 4, "tie": TIE, "close": CLOSE}
        if not self.fresh:  # of a tiny model, on which nothing is a tie
            spec |= {"steps": self.steps, "tie": 0.0, "close": 1e-4}
        return self._ask(Cell("flexi", context, 1), spec)

    def memory(self, cell: Cell) -> dict[str, Any]:
        """See `memory_side.memory`."""
        return self._ask(cell, {"call": "memory", "steps": self.steps}, module="bench.memory_side")

    def encode(self, text: str) -> list[int]:
        """Token ids, by the tokenizer that transformers has."""
        path = self.folder / "text"
        path.write_text(text, encoding="utf-8")
        spec = {"call": "encode", "text_file": str(path), "model": self.model}
        return self._fresh("bench.torch_side", spec)["tokens"]

    def _ask(
        self,
        cell: Cell,
        spec: dict[str, Any],
        turn: int = 0,
        module: str = "bench.flexijax_side",
    ) -> dict[str, Any]:
        path = self.folder / f"{cell.context}x{cell.batch}.json"
        # Every request begins somewhere else in the text.
        shift = max(1, (len(self.token_ids) - cell.context) // cell.batch)
        starts = [shift * row for row in range(cell.batch)]
        prompts = [self.token_ids[start : start + cell.context] for start in starts]
        path.write_text(json.dumps(prompts))
        spec = {"prompts_file": str(path), "model": self.model, **spec}
        spec["budget_tokens"] = self.budget_tokens
        if cell.system in TORCH:
            module, kind = "bench.torch_side", TORCH[cell.system]
            spec |= {"kind": kind, "threads": self.threads}
            if kind.startswith("flexi"):
                profile = lookup.load(self.profile)
                spec["unstable"] = [*map(profile.unstable_heads, range(profile.num_layers))]
        else:
            spec |= {"policy": cell.system, "profile": self.profile}
        key = repr((asdict(cell), sorted(spec.items()), prompts, turn, results.commit()))
        kept = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.found"
        if not kept.exists():
            kept.write_text(json.dumps(self._fresh(module, spec)))
        return json.loads(kept.read_text())

    def _fresh(self, module: str, spec: dict[str, Any]) -> dict[str, Any]:
        if self.fresh:
            return in_fresh_process(module, spec, threads=self.threads, lock=self.lock)
        return answered(dict(spec), *importlib.import_module(module).CALLS)


def tiny_model(folder: Path) -> dict[str, Any]:
    """A random model and its profile in a folder; what takes the place of arguments."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        # Ten times the usual one: with it attention would be even, and every choice a tie.
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    profile = HeadProfile(
        model="tiny",
        num_layers=2,
        num_kv_heads=2,
        unstable=((0, 1),),
        page_size=16,
        budget_pages=4,
        source="by hand",
    )
    profile.save(folder / "tiny.json")
    return {
        "model": str(folder / "tiny"),
        "profile": str(folder / "tiny.json"),
        "budget_tokens": 64,
        "steps": 16,
        "fed": 16,
        "pages_context": 150,
    }
