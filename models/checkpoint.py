"""`save` and `restore`: a model as an Orbax checkpoint beside its config and tokenizer files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexijax.models import end_of_text, tokenizer
from flexijax.models.config import ModelConfig, RopeScaling
from flexijax.models.decoder import Decoder, Params
from flexijax.models.errors import LoadError, tried
from flexijax.models.files import read_json, short
from flexijax.models.language_model import LanguageModel, from_config
from flexijax.models.parts import leaf_shapes
from flexijax.models.placement import Placement, check_memory, placed
from flexijax.models.weights import overflow

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
        elif lm.stop_ids:
            end_of_text.save_stop_ids(partial, lm.stop_ids)
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
    marker = tried(problems, "", lambda: read_json(path / MARKER)) or {}
    config = tried(problems, f"{MARKER}: ", lambda: _config(marker, max_context))
    words = tried(problems, "tokenizer: ", lambda: tokenizer.from_directory(path))
    ends = tried(problems, "", lambda: end_of_text.stop_ids(path)) or frozenset()
    shapes: dict[str, tuple[int, ...]] = {}
    if config is not None:
        problems += end_of_text.outside(ends, config.vocab_size)
        stored = tried(problems, "params: ", lambda: _stored_arrays(path / "params"))
        if stored is not None and config.num_layers > len(stored):
            # A damaged count may be in the billions: not worth a line for each of their arrays.
            claim = f"{MARKER} says {config.num_layers} layers"
            problems.append(f"{claim}, and there are {len(stored)} arrays in all")
        elif stored is not None:
            shapes = _shapes(config)
            problems += _differences(stored, shapes)
    name = marker.get("name", path.name)
    if not isinstance(name, str):
        problems.append(f"{MARKER}: name={short(name)}: must be a string")
    if problems or config is None:
        raise LoadError(str(path), problems)
    check_memory(shapes.values(), dtype=dtype, sharding=sharding, description=str(path))
    params = _read(path / "params", config, dtype, sharding)
    if infinite := _not_finite(params):
        del params
        wide = dict(_named(_read(path / "params", config, jnp.float32, sharding)))
        raise LoadError(str(path), [_not_finite_problem(n, wide[n], dtype) for n in infinite])
    return from_config(config, params, name=name, dtype=dtype, tokenizer=words, stop_ids=ends)


def _read(folder: Path, config: ModelConfig, dtype: Any, sharding: Placement) -> Params:
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
            return checkpointer.restore(folder.absolute(), args=target)
    except Exception as error:  # Orbax and TensorStore raise many kinds
        problem = f"params: {type(error).__name__}: {error}"
        raise LoadError(str(folder.parent), [problem]) from error


def _not_finite(params: Params) -> list[str]:
    """The arrays that hold values that are not finite."""
    return [name for name, leaf in _named(params) if not bool(jnp.isfinite(leaf).all())]


def _not_finite_problem(name: str, stored: jax.Array, dtype: Any) -> str:
    largest = float(jnp.abs(stored).max())
    if math.isfinite(largest):
        return f"{name}: {overflow(largest, dtype)}"
    return f"{name}: holds values that are not finite"


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths, as "layers/0/qkv/kernel"."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: hasattr(node, "shape"))
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _orbax() -> Any:
    """Orbax, once a checkpoint is at hand: it is half the time of `import flexijax`, and 30 MB."""
    import orbax.checkpoint

    return orbax.checkpoint


def _stored_arrays(params: Path) -> dict[str, Any]:
    """Shape and dtype of every array in the checkpoint, by path; reads no array."""
    if not params.is_dir():
        raise ValueError("there is no such folder")
    # Orbax would wait for ever on a FIFO, and read a device to its end.
    for folder, _, files in os.walk(params):
        for file in files:
            place = os.path.join(folder, file)
            if not stat.S_ISREG(os.lstat(place).st_mode):
                raise ValueError(f"{short(os.path.relpath(place, params))} is not a regular file")
    with _orbax().StandardCheckpointer() as checkpointer:
        return dict(_named(checkpointer.metadata(params.absolute()).item_metadata.tree))


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a model, by path."""
    outer, layer = leaf_shapes(config)
    shapes = {"/".join(path): shape for path, shape in outer.items()}
    for index in range(config.num_layers):
        shapes |= {f"layers/{index}/{'/'.join(path)}": shape for path, shape in layer.items()}
    return shapes


def _differences(stored: dict[str, Any], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"missing array: {name}" for name in wanted if name not in stored]
    for name, array in stored.items():
        if name not in wanted:
            problems.append(f"{name}: the config has no place for it")
        elif tuple(array.shape) != wanted[name]:
            problems.append(
                f"{name}: shape {short(tuple(array.shape))}, the config says {wanted[name]}"
            )
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{name}: dtype {short(array.dtype)}, not a float")
    return problems


def _config(marker: dict[str, Any], max_context: int | None) -> ModelConfig:
    if marker.get("format") != _FORMAT:
        raise ValueError(f"format {short(marker.get('format'))}: this version reads {_FORMAT}")
    fields = _fields(ModelConfig, "config", marker.get("config"))
    if fields["rope_scaling"] is not None:
        scaling = _fields(RopeScaling, "rope_scaling", fields["rope_scaling"])
        fields["rope_scaling"] = RopeScaling(**scaling)
    config = ModelConfig(**fields)
    return config if max_context is None else config.with_context(max_context)


def _fields(kind: Any, name: str, values: Any) -> dict[str, Any]:
    """values, where they are an object with exactly the fields of the dataclass `kind`."""
    known = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(values, dict) or set(values) != set(known):
        raise ValueError(f"{name}={short(values)}: must be an object of {', '.join(known)}")
    return dict(values)
