"""How work is divided among the programs of a GPU: whole waves, and nothing left out."""

import pytest

from flexijax.aot.targets import target
from flexijax.pallas_kernels import platform
from flexijax.pallas_kernels.sparse_decode.tuning import TuningConfig

pytestmark = pytest.mark.any_jax


@pytest.mark.parametrize("tokens", [16, 1056, 4096, 32768])
@pytest.mark.parametrize("gpu", ["h100", "a100"])
def test_attention_never_pays_for_a_second_wave(gpu, tokens):
    """Parts are rounded down: as many programs as run at once, or one for each head."""
    capability = target(gpu).compute_capability
    with platform.compiling_for("gpu", compute_capability=10 * capability[0] + capability[1]):
        assert platform.multiprocessors() == target(gpu).cores
        for heads in (1, 2, 8, 40, 112, 128, 256, 312, 432, 433, 528, 529, 2048):
            config = TuningConfig.choose(heads=heads, tokens=tokens, row_bytes=256)
            assert config.block_tokens * config.steps * config.splits >= tokens
            # None of them idle.
            assert config.block_tokens * config.steps * (config.splits - 1) < tokens
            assert heads * config.splits <= max(heads, 4 * target(gpu).cores)


def test_a_layer_of_the_report_is_one_wave():
    """16 requests of 8 KV heads that attend 66 pages of 16 tokens."""
    with platform.compiling_for("gpu", compute_capability=90):
        assert TuningConfig.choose(heads=128, tokens=1056, row_bytes=256).splits == 4
    with platform.compiling_for("gpu", compute_capability=80):
        assert TuningConfig.choose(heads=128, tokens=1056, row_bytes=256).splits == 3
