"""Who computes an operation, by name, for the files of public operations.

An operation is a folder, an implementation a file in it, such as `page_scores/triton.py`.
`implementation` is None (Pallas on a GPU, XLA elsewhere), "xla", "pallas" (on a CPU in interpret
mode: slow, for tests) or "triton" (jax-triton, GPU only). A named one that cannot run raises.
"""

import importlib
import importlib.util
from types import ModuleType

from flexijax.pallas_kernels import platform

# "pallas" and "triton" are one kernel written twice for GPUs: jax deprecates Pallas through Triton,
# and both are kept only until it is gone; then "triton" stays.
IMPLEMENTATIONS = ("xla", "pallas", "triton")


def choose(implementation: str | None) -> str:
    """The name of what computes. Raises ValueError for one that is unknown or cannot run here."""
    chosen = platform.default_implementation() if implementation is None else implementation
    if chosen not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be None or one of {IMPLEMENTATIONS}, got {chosen!r}")
    if chosen == "triton":
        if importlib.util.find_spec("jax_triton") is None:
            raise ValueError(
                "implementation='triton' needs jax-triton: pip install 'flexijax[cuda12]'"
            )
        if not platform.is_gpu():
            raise ValueError("implementation='triton' runs on NVIDIA GPUs only, not on this device")
    return chosen


def choose_without_triton(implementation: str | None) -> str:
    """As `choose`, of operations that have no Triton kernel: there it means the one in Pallas."""
    chosen = choose(implementation)
    return "pallas" if chosen == "triton" else chosen


def module_of(operation: str, name: str) -> ModuleType:
    """An operation's implementation, imported when first used: Triton and cuDNN are optional."""
    return importlib.import_module(f"flexijax.pallas_kernels.{operation}.{name}")
