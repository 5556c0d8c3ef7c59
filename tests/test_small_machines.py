"""A machine with little memory: what does not fit is refused with the arithmetic, the rest runs."""

import subprocess
import sys

import pytest

import flexijax
from flexijax.engine.plan import make_program
from flexijax.pallas_kernels import platform
from tests.tiny_models import tiny_model

CHILD = """
import resource
import flexijax
from tests.tiny_models import tiny_model

lm = tiny_model(max_context=2**25)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
used = int(status["VmSize"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30,) * 2)
for new in (2**24, 8):
    try:
        made = flexijax.generate(
            lm, [[1, 2, 3]], max_new_tokens=new, cache=flexijax.CacheConfig(policy="full")
        )
    except ValueError as error:
        print(error)
    else:
        print(len(made[0].token_ids), "tokens")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux enforces this limit")
def test_a_limit_of_the_process_is_an_error_with_the_arithmetic():
    """16 million tokens of this model are 4.3 GB, twice that with the prompt's; 3 are left."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refused, ran = done.stdout.splitlines()
    assert ran == "8 tokens"
    assert refused.startswith("16777219 tokens of context need")
    free = float(refused.split("(free: ")[1].split(")")[0])
    assert 2.5 < free <= 3.3


def test_what_xla_would_not_pin_is_refused_by_name(monkeypatch):
    with platform.compiling_for("gpu"):
        monkeypatch.delenv(platform.PINNED_LIMIT, raising=False)
        assert platform.max_pinned_bytes() == 64 << 30
        monkeypatch.setenv(platform.PINNED_LIMIT, "100")
        assert platform.max_pinned_bytes() == 100 << 30
    assert platform.max_pinned_bytes() is None, "there is no GPU here"
    lm = tiny_model()
    profile = flexijax.HeadProfile(
        model="tiny-llama",
        num_layers=2,
        num_kv_heads=2,
        unstable=((0, 1),),
        page_size=4,
        budget_pages=4,
        source="by hand",
    )
    cache = flexijax.CacheConfig(policy="flexi", profile=profile)
    monkeypatch.setattr(platform, "max_pinned_bytes", lambda: 1000)
    with pytest.raises(ValueError, match=f"XLA pins at most .*{platform.PINNED_LIMIT}"):
        make_program(lm, cache, max_tokens=400)
    make_program(lm, flexijax.CacheConfig(policy="full"), max_tokens=400)
