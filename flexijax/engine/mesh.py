"""A model and its programs over the devices of a mesh, each with some KV heads."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from flexijax.cache.shard_layout import shard_layout
from flexijax.engine.program import Program
from flexijax.models.decoder import Decoder
from flexijax.models.language_model import LanguageModel
from flexijax.models.shards import shard_bytes, shard_decoder, shard_params
from flexijax.pallas_kernels import placing
from flexijax.policies.base import Policy


def check_mesh(lm: LanguageModel, mesh: Mesh | None) -> Mesh | None:
    """The mesh, its axis left to the compiler's care where nothing is said (`AxisType.Auto`).

    Raises ValueError, with the reason, for one over which the model cannot be cut.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r} must be None or a jax.sharding.Mesh")
    if len(mesh.axis_names) != 1:
        raise ValueError(
            f"mesh has the axes {mesh.axis_names}, it must have one: over KV heads, such as "
            "jax.make_mesh((2,), ('heads',))"
        )
    shard_decoder(lm.decoder, mesh.size, mesh.axis_names[0])
    return Mesh(mesh.devices, mesh.axis_names)


def over_mesh(program: Program, mesh: Mesh | None) -> Program:
    """What each device of the mesh runs, of a program for one device; None: the same.

    Raises ValueError, with the reason, where the model or the policy's head groups cannot be cut.
    """
    if mesh is None:
        return program
    policy = program.policy
    if any(group.codec is not None for *_, group in program.layout.all_groups()):
        raise ValueError(
            "device_codec and host_codec are for one device: leave them at None, or leave mesh out"
        )
    if type(policy).across_heads is not Policy.across_heads:
        raise ValueError(
            f"policy={policy.name!r} ranks a head's tokens by what all heads of its layer saw, and "
            "over mesh each device has some of them: leave mesh out, or use another policy"
        )
    return dataclasses.replace(
        program,
        decoder=shard_decoder(program.decoder, mesh.size, mesh.axis_names[0]),
        layout=shard_layout(program.layout, mesh.size),
        mesh=mesh,
        whole=program.layout,
    )


def model_of(lm: LanguageModel, program: Program) -> LanguageModel:
    """The model with its weights where the program wants them: over its mesh, if it has one.

    Each KV head goes, with its queries and its rows of the output projection, to the device that
    keeps its pages. Weights elsewhere stay: let go of `lm` where there is no room for both.
    """
    if program.mesh is None:
        return lm
    assert isinstance(lm.decoder, Decoder) and program.layout.splits is not None
    heads = [split.heads for split in program.layout.splits]
    with placing.over(program.mesh):
        params = shard_params(lm.decoder.config, lm.params, heads)
    return dataclasses.replace(lm, params=params)


def weight_bytes(lm: LanguageModel, program: Program) -> int:
    """Of each device, what `model_of` is still to bring there: 0 without a mesh."""
    return 0 if program.mesh is None else shard_bytes(lm.params, program.mesh.size)


def of_several_processes(program: Program) -> bool:
    """Whether the program's mesh has devices of other processes too."""
    return program.mesh is not None and placing.has_other_processes(program.mesh)


def sharing_host(program: Program) -> int:
    """Devices of the program's mesh whose memory is this machine's: 1 without a mesh."""
    return 1 if program.mesh is None else len(program.mesh.local_devices)
