"""A machine with little memory: what does not fit is refused with the arithmetic, the rest runs."""

import subprocess
import sys

import pytest

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
