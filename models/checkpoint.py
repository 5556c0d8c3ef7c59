"""`save` and `restore`: a model as an Orbax checkpoint beside its config and tokenizer files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from flexijax.models import tokenizer
from flexijax.models.config import ModelConfig, RopeScaling
from flexijax.models.decoder import Decoder
from flexijax.models.language_model import LanguageModel, from_config
from flexijax.models.weights import LoadError, Placement, placed, tried

MARKER = "flexijax.json"  # its presence says that a directory is one of these checkpoints
_FORMAT = 2


def save(lm: LanguageModel, path: str | os.PathLike[str]) -> None:
    """Writes a model to a new directory: flexijax.json, tokenizer files, params by Orbax.

    The directory appears under its name only when all of it is written. ValueError if path exists,
    or if the decoder is not this package's, since only its configuration can be written down.
    """
    target = Path(path).expanduser().absolute()
    if target.exists():
        raise ValueError(f"path={str(target)!r}: exists already; give the name of a new directory")
    if not isinstance(lm.decoder, Decoder):
        kind = type(lm.decoder).__name__
        raise ValueError(f"lm.decoder is a {kind}: only flexijax.models.decoder.Decoder is saved")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        config = dataclasses.asdict(lm.decoder.config)
        marker = {"format": _FORMAT, "name": lm.name, "config": config}
        (partial / MARKER).write_text(json.dumps(marker, indent=1))
        if lm.tokenizer is not None:
            lm.tokenizer.save(partial)
        with _orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / "params", lm.params)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def restore(
    path: Path,
    *,
    dtype: Any,
    max_context: int | None,
    sharding: Placement,
) -> LanguageModel:
    """Reads what `save` wrote, each array straight into dtype and sharding, one copy in memory.

    LoadError for a directory that is damaged or of a newer format.
    """
    problems: list[str] = []
    marker = tried(problems, "", lambda: tokenizer.read_json(path / MARKER)) or {}
    config = tried(problems, f"{MARKER}: ", lambda: _config(marker, max_context))
    words = tried(problems, "tokenizer: ", lambda: tokenizer.from_directory(path))
    if config is not None:
        stored = tried(problems, "params: ", lambda: _stored_shapes(path / "params"))
        if stored is not None:
            problems += _differences(stored, _shapes(Decoder(config).abstract(dtype=dtype)))
    if problems or config is None:
        raise LoadError(str(path), problems)
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=placed(sharding, leaf.shape) or default
        ),
        Decoder(config).abstract(dtype=dtype),
    )
    # Orbax reads arrays side by side; what is on the way at once is held to a little more than the
    # largest array (in GB, at float32 on disk), so that large models are not in memory twice.
    largest = max(leaf.size for leaf in jax.tree.leaves(abstract))
    ocp = _orbax()
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=1 + 4 * largest // 10**9)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            target = ocp.args.StandardRestore(abstract)
            params = checkpointer.restore((path / "params").absolute(), args=target)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        problem = f"params: {type(error).__name__}: {error}"
        raise LoadError(str(path), [problem]) from error
    name = marker.get("name", path.name)
    return from_config(config, params, name=name, dtype=dtype, tokenizer=words)


def _orbax() -> Any:
    """Orbax, once a checkpoint is at hand: it is half the time of `import flexijax`, and 30 MB."""
    import orbax.checkpoint

    return orbax.checkpoint


def _stored_shapes(params: Path) -> dict[str, tuple[int, ...]]:
    """Of every array in the checkpoint, by path; reads no array."""
    if not params.is_dir():
        raise ValueError("there is no such folder")
    with _orbax().StandardCheckpointer() as checkpointer:
        return _shapes(checkpointer.metadata(params.absolute()).item_metadata.tree)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }


def _differences(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> list[str]:
    return [
        *(f"missing array: {name}" for name in wanted if name not in stored),
        *(f"{name}: the config has no place for it" for name in stored if name not in wanted),
        *(
            f"{name}: shape {stored[name]}, the config says {shape}"
            for name, shape in wanted.items()
            if stored.get(name, shape) != shape
        ),
    ]


def _config(marker: dict[str, Any], max_context: int | None) -> ModelConfig:
    if marker["format"] != _FORMAT:
        raise ValueError(f"format {marker['format']!r}: this version reads {_FORMAT}")
    fields = dict(marker["config"])
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    config = ModelConfig(**fields)
    return config if max_context is None else config.with_context(max_context)
