"""What the assembler says of each kernel: registers, spills, and which instructions it runs."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from flexijax.aot.issue import issued
from flexijax.aot.targets import Target
from flexijax.aot.thunks import Thunk

_PTX_ENTRY = re.compile(r"\.entry (\w+)")
_ENTRY = re.compile(r"Compiling entry function '(\S+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)

# Where the CUDA tools lie in the wheels nvidia-cuda-nvcc-cu12 and triton, below their packages.
_PLACES = {
    "ptxas": (("nvidia.cuda_nvcc", "bin"), ("triton", "backends/nvidia/bin")),
    "nvdisasm": (("triton", "backends/nvidia/bin"),),
}


@dataclass(frozen=True)
class KernelReport:
    """One kernel as assembled: sizes in bytes, `instructions` by opcode (empty if not looked at).

    registers are per thread, threads and shared_bytes per block, grid in blocks of one launch.
    issued: instructions of one warp, loops as often as they go round (0 if not looked at), at
    least so many unless issued_exact. names: of all kernels that differ in nothing else.
    """

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    grid: tuple[int, int, int]
    occupancy: float
    instructions: dict[str, int] = field(default_factory=dict)
    issued: int = 0
    issued_exact: bool = True
    names: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """What kernels of all layers have in common: the name without its number."""
        return self.name.rstrip("_0123456789")

    @property
    def tensor_core_instructions(self) -> int:
        """Matrix products on tensor cores (HMMA, HGMMA, IMMA, ...)."""
        return self._count(r"[HIQDO]?G?MMA")

    @property
    def wide_loads(self) -> int:
        """Loads of 128 bits from global memory, into registers or straight to shared memory."""
        return self._count(r"LDG(STS)?(\.\w+)*\.128")

    def _count(self, opcode: str) -> int:
        matches = re.compile(opcode).match
        return sum(count for name, count in self.instructions.items() if matches(name))


def tool(name: str) -> str | None:
    """The path of ptxas or nvdisasm: on PATH or in an installed wheel; None if nowhere."""
    for package, folder in _PLACES[name]:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for root in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(root, folder, name)).is_file():
                return str(path)
    return shutil.which(name)


def kernels(
    dump: Path,
    thunks: Iterable[Thunk],
    *,
    target: Target,
    named: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[KernelReport, ...]:
    """Reports on every kernel in `thunks`, from the folder given to `xla_dump_to`.

    Kernels that differ in nothing but their name, as those of equal layers, are one report, under
    the first name.

    named: look only at kernels that have this in their name; assembling all of a model's takes
    longer than compiling it. progress: called with (files assembled, files).
    RuntimeError names the extra to install when there is no ptxas, or what ptxas complained of.
    """
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    if ptxas is None:
        raise RuntimeError("no ptxas found: pip install 'flexijax[aot]'")
    launches = {
        thunk.kernel: thunk
        for outer in thunks
        for thunk in outer
        if thunk.kernel and named in thunk.kernel
    }
    distinct: dict[tuple, Path] = {}
    same: dict[str, list[str]] = {}  # under the first name, which `distinct` assembles
    for ptx in sorted(dump.glob("*.ptx")):
        source, names = ptx.read_text(), _named(ptx, launches)
        for name in names:
            source = re.sub(rf"\b{name}\b", "kernel", source)
        if names:
            sizes = [(launches[name].grid, launches[name].shared_bytes) for name in names]
            first = distinct.setdefault((source, *sizes), ptx)
            for name, known in zip(names, _named(first, launches), strict=True):
                same.setdefault(known, []).append(name)
    reports = []
    for done, ptx in enumerate(distinct.values(), start=1):
        reports += [
            replace(report, names=tuple(same[report.name]))
            for report in _assemble(ptx, launches, ptxas, nvdisasm, target)
        ]
        if progress is not None:
            progress(done, len(distinct))
    return tuple(sorted(reports, key=lambda report: report.name))


def _named(ptx: Path, launches: Mapping[str, Thunk]) -> list[str]:
    return [name for name in _PTX_ENTRY.findall(ptx.read_text()) if name in launches]


def _assemble(
    ptx: Path,
    launches: Mapping[str, Thunk],
    ptxas: str,
    nvdisasm: str | None,
    target: Target,
) -> list[KernelReport]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        log = _run([ptxas, "-v", f"-arch={target.architecture}", str(ptx), "-o", cubin])
        bodies = _bodies(_run([nvdisasm, "-c", cubin])) if nvdisasm else {}
    source = ptx.read_text()
    reports = []
    sections = _ENTRY.split(log)
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        spills, registers = _SPILLS.search(text), _REGISTERS.search(text)
        if name not in launches or not spills or not registers:
            continue
        launch, used = launches[name], int(registers[1])
        body = bodies.get(name, "")
        counted = issued(body, source)
        shared, threads = launch.shared_bytes, launch.threads
        reports.append(
            KernelReport(
                name=name,
                registers=used,
                spill_bytes=int(spills[1]) + int(spills[2]),
                shared_bytes=shared,
                threads=threads,
                grid=launch.grid,
                occupancy=target.occupancy(registers=used, shared_bytes=shared, threads=threads),
                instructions=dict(Counter(_INSTRUCTION.findall(body)).most_common()),
                issued=counted.instructions,
                issued_exact=counted.exact,
            )
        )
    return reports


def _bodies(listing: str) -> dict[str, str]:
    """The section of each kernel in nvdisasm's listing."""
    sections = re.split(r"^\.text\.(\S+):", listing, flags=re.MULTILINE)
    return dict(zip(sections[1::2], sections[2::2], strict=True))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")
    return done.stdout + done.stderr
