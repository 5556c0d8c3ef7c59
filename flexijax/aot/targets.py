"""GPUs that programs can be compiled for without having one: the rows of targets.json."""

import json
from dataclasses import dataclass
from pathlib import Path

_DATA = Path(__file__).with_name("targets.json")


@dataclass(frozen=True)
class Target:
    """What the compiler and a roofline need to know of a GPU; a core is a multiprocessor."""

    name: str
    description: str
    compute_capability: tuple[int, int]
    architecture: str
    cores: int
    threads_per_core: int
    blocks_per_core: int
    registers_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float
    device_bytes: int
    device_bytes_per_second: float
    host_bytes_per_second: float
    bfloat16_flops_per_second: float

    @property
    def config(self) -> str:
        """XLA's GpuTargetConfig as text."""
        major, minor = self.compute_capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_memory_per_core}
              threads_per_core_limit: {self.threads_per_core}
              core_count: {self.cores} fpus_per_core: 128
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {int(self.device_bytes_per_second)}
              l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.device_bytes}
              shared_memory_per_block_optin: {self.shared_memory_per_block}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              registers_per_core_limit: {self.registers_per_core}
              registers_per_block_limit: 65536
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 7 }}
            runtime_version {{ major: 12 minor: 8 patch: 0 }}
            device_description_str: "{self.description}"
        """

    def occupancy(self, *, registers: int, shared_bytes: int, threads: int) -> float:
        """Share of a core's threads that can be resident, for a kernel's needs per block."""
        warps = -(-threads // 32)
        per_warp = -(-max(registers, 1) * 32 // 256) * 256
        blocks = min(
            self.blocks_per_core,
            self.threads_per_core // (warps * 32),
            self.registers_per_core // (per_warp * warps),
            # The driver keeps 1 KiB of shared memory for itself in every block.
            self.shared_memory_per_core // (shared_bytes + 1024),
        )
        return blocks * warps * 32 / self.threads_per_core


def targets() -> dict[str, Target]:
    """Every known GPU by its name."""
    rows = json.loads(_DATA.read_text())
    return {
        name: Target(name=name, **{**row, "compute_capability": tuple(row["compute_capability"])})
        for name, row in rows.items()
    }


def target(name: str) -> Target:
    """The GPU of that name ("h100", "a100"); ValueError names those that are known."""
    known = targets()
    if name not in known:
        raise ValueError(f"target must be one of {sorted(known)}, got {name!r}")
    return known[name]
