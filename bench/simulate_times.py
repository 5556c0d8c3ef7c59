"""Predicted seconds of what an engine runs on a GPU, from what `compile-report` counted.

    seconds = launches * seconds of one + the longer of bytes / bandwidth and instructions / rate

Linear in the rows that run and in the tokens that they hold: of a policy there are two reports, at
two contexts and one batch. Kernels of this library are told apart by name; all other work of a
step, which is the model's own, takes the same however many rows run, since it reads the weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from flexijax.aot import estimate, targets
from flexijax.aot.footprint import abstract_params
from flexijax.cache.prefill_kv import Piece
from flexijax.engine.program import Program
from flexijax.models.config import ModelConfig

_SHARES = ("issue", "flops", "host", "promoted", "memory")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What no compiler tells. Shares are of the target's peaks, seconds of one each.

    The first five are those of `flexijax.aot.estimate`, which has their reasons. bandwidth: of
    device memory; the target's peak is 3.35 TB/s, and what is sold as an H100 of 94 GB has 2.4 or
    3.9. flops: what matrix products and attention of a prompt's chunk reach. host: of the link's
    bandwidth, for kernels that read pinned memory directly. promoted: of a stable head's pages,
    those that a rerank brings from the host; SmolLM2's 0.24 (`bench/results/closeness.json`).
    boundary: Python's seconds at one, of which `schedule` takes most with fifty requests of 30
    thousand tokens. memory: of the device's, what weights and cache may take; the rest is the
    runtime's and what programs work in.
    """

    bandwidth: float = estimate.DRAM_EFFICIENCY
    issue: float = estimate.ISSUE_EFFICIENCY
    graph_node: float = estimate.GRAPH_NODE_SECONDS
    launch: float = estimate.LAUNCH_SECONDS
    host_sync: float = estimate.HOST_SYNC_SECONDS
    flops: float = 0.5
    host: float = 0.8
    promoted: float = 0.25
    boundary: float = 0.006
    memory: float = 0.95

    def changed(self, name: str, factor: float) -> Assumptions:
        """With one of them so many times what it is; a share of a peak is at most all of it."""
        value = factor * getattr(self, name)
        return dataclasses.replace(self, **{name: min(value, 1.0) if name in _SHARES else value})


@dataclasses.dataclass(frozen=True)
class Linear:
    """seconds = once + rows * row + tokens * token; tokens: that those rows hold together."""

    once: float = 0.0
    row: float = 0.0
    token: float = 0.0

    def seconds(self, rows: float, tokens: float) -> float:
        """Nothing for no rows."""
        return self.once + rows * self.row + tokens * self.token if rows else 0.0


@dataclasses.dataclass(frozen=True)
class Times:
    """Of one policy. step: a decode step. rerank: the end of a chunk of the rows it is due for.

    rerank_bytes: of the link to the host, for each of those rows. piece_once: of a prompt's piece
    through one layer, beside its flops; flops_per_second: of those. layer_flops: of one token
    through a layer's matrix products; key_flops: for each key that it attends to. commit: of one
    layer of a prompt, by its tokens.
    """

    step: Linear
    rerank: Linear
    piece_once: float
    layer_flops: float
    key_flops: float
    flops_per_second: float
    commit: Linear

    def piece(self, piece: Piece) -> float:
        """Seconds of a prompt's piece through one layer."""
        flops = piece.size * (self.layer_flops + piece.keys * self.key_flops)
        return self.piece_once + flops / self.flops_per_second


def load_reports(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """What `flexijax compile-report --json FILE` wrote, in the order of the files.

    Raises ValueError for a file that holds no report.
    """
    found = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        reports = [content["report"]] if "report" in content else content.get("compiled", [])
        if not reports:
            raise ValueError(f"{path} holds nothing that `flexijax compile-report --json` compiled")
        found += reports
    return found


def times_of(
    program: Program,
    config: ModelConfig,
    reports: tuple[Mapping[str, Any], Mapping[str, Any]],
    of: Assumptions,
) -> Times:
    """What the programs of a policy take. program: that is simulated, with its sizes."""
    target = targets.target(reports[0]["target"])
    layers, layout = config.num_layers, program.layout
    rerank = Linear()
    if all("end of a chunk" in report["stages"] for report in reports):
        rerank = _linear("end of a chunk", reports, of)
        pages = of.promoted * sum(
            len(group.heads) * (group.room or 0)
            for *_, group in layout.all_groups()
            if group.kind == "offloaded"
        )
        pages += layout.heads_of("offloaded")  # that filled up, to the host
        link = target.host_bytes_per_second * of.host
        rerank = dataclasses.replace(
            rerank, row=rerank.row + pages * layout.moved_page_bytes / link
        )
    longest = max(reports, key=lambda report: report["context"])
    prefill, commit = (longest["stages"][stage] for stage in ("prefill", "commit"))
    shape, spec = config.attention_shape, program.prefill_spec()
    pieces = layers * -(-longest["context"] // spec.chunk)
    host_bytes = layout.heads_of("offloaded") / layers * layout.moved_page_bytes
    page_s = host_bytes / (target.host_bytes_per_second * of.host)
    return Times(
        step=_linear("decode", reports, of),
        rerank=rerank,
        piece_once=_launch_seconds(prefill["launches"]["total"], of) / pieces,
        layer_flops=2 * _layer_weights(config),
        key_flops=4 * shape.num_heads * shape.head_dim,
        flops_per_second=target.bfloat16_flops_per_second * of.flops,
        commit=Linear(
            once=_launch_seconds(commit["launches"]["total"], of) / layers,
            token=page_s / layout.sizes.page_size,
        ),
    )


def _linear(
    stage: str, reports: tuple[Mapping[str, Any], Mapping[str, Any]], of: Assumptions
) -> Linear:
    """From two contexts: our kernels' work is of rows and tokens, all else is there once."""
    (less, more), batch = reports, reports[0]["batch"]
    once, first = _split(less["stages"][stage], of)
    _, second = _split(more["stages"][stage], of)
    token = (second - first) / (batch * (more["context"] - less["context"]))
    return Linear(once, first / batch - token * less["context"], token)


def _split(stage: Mapping[str, Any], of: Assumptions) -> tuple[float, float]:
    """(launches and the model's own work, our kernels' work), in seconds."""
    found, rate = stage["estimate"], of.bandwidth
    ours = at_report = 0.0
    for kernel in found["kernels"]:
        by_bytes, by_issue = kernel["byte_seconds"], kernel["issue_seconds"]
        ours += max(by_bytes / rate, by_issue / of.issue)
        at_report += max(by_bytes / estimate.DRAM_EFFICIENCY, by_issue / estimate.ISSUE_EFFICIENCY)
    others = max(0.0, found["work"] - at_report) * estimate.DRAM_EFFICIENCY / rate
    launches = (
        found["graph_nodes"] * of.graph_node / estimate.GRAPH_NODE_SECONDS
        + found["outside"] * of.launch / estimate.LAUNCH_SECONDS
        + found["host_syncs"] * of.host_sync / estimate.HOST_SYNC_SECONDS
    )
    return others + launches, ours


def _launch_seconds(counts: Mapping[str, Any], of: Assumptions) -> float:
    return (
        counts["in_graphs"] * of.graph_node
        + (counts["outside"] + counts["graphs"]) * of.launch
        + counts["host_syncs"] * of.host_sync
    )


def _layer_weights(config: ModelConfig) -> float:
    """Of one layer: its matrix products take two flops a token for each."""
    layers = abstract_params(config)["layers"]
    return sum(leaf.size for leaf in jax.tree.leaves(layers)) / config.num_layers
