"""Settings that hold for every test, and the few fixtures that several files share."""

import gc
import os
from pathlib import Path

import pytest

# Nothing here may reach for a network: a model hub that answers would hide a missing file.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="session")
def strict_dtypes():
    """A silent promotion to float32 doubles the memory of what it touches, so it is an error."""
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # A GPU would round the operands of float32 products to ten bits, and what is compared to 1e-5
    # here would differ.
    jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True, scope="session")
def own_compilation_cache(tmp_path_factory):
    """Compiled programs are kept, apart from the user's, which may be locked; a folder a process.

    The command line turns this on and leaves it on: so in every test, not in those that come later.
    """
    from flexijax.cli.terminal import use_compilation_cache

    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("FLEXIJAX_CACHE_DIR", None)
    use_compilation_cache()


@pytest.fixture(autouse=True, scope="module")
def few_executables():
    """Programs of one file are no use to the next; all together hold too many memory maps."""
    yield
    from flexijax.engine.jit_cache import forget_compiled

    forget_compiled()
    gc.collect()


@pytest.fixture(scope="module")
def short_chunks():
    """Prompts of a few dozen tokens are read in several chunks, as long ones are in use."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"cpu": (32, 8, 2, 1), "gpu": (32, 8, 3, 4)}
        patch.setattr("flexijax.pallas_kernels.platform._PREFILL_SIZES", sizes)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def leval_dir() -> Path:
    """The folder of L-Eval task files, which are not shipped with the project."""
    named = os.environ.get("FLEXIJAX_LEVAL")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data" / "leval"
    if not any(folder.glob("*.jsonl")):
        pytest.skip(f"no L-Eval *.jsonl files in {folder}; name their folder in FLEXIJAX_LEVAL")
    return folder
