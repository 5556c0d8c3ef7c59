"""A tiny run of all other parts under NVIDIA's memory checker, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from bench.gpu.report import Part, Skip
from bench.gpu.sizes import Sizes

TOOL = "compute-sanitizer"
# What the checker ends with where it found something.
_FOUND = 99


def run(part: Part, sizes: Sizes) -> None:
    """Every access of every kernel, against what was allocated."""
    tool = shutil.which(TOOL)
    if tool is None:
        raise Skip(f"{TOOL} is missing: it comes with the CUDA toolkit; put it on PATH")
    # Each array an allocation of its own: within one pool nothing is out of bounds.
    own = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [
            *(tool, "--tool", "memcheck", "--error-exitcode", str(_FOUND)),
            *(sys.executable, "-m", "bench.gpu", "--quick", "--one-process"),
        ],
        capture_output=True,
        text=True,
        env=os.environ | own,
    )
    errors = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    part.check("no kernel reads or writes out of bounds", done.returncode != _FOUND, errors[-1:])
    part.check("all parts passed", done.returncode == 0, (done.stdout + done.stderr)[-2000:])
