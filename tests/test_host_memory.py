"""What a process may still take: the system's word, control groups, and its own limits."""

import subprocess
import sys

import pytest

from flexijax.pallas_kernels.host_memory import available_host_bytes

pytestmark = pytest.mark.any_jax

MIB = 1 << 20


def tree(root, **files):
    """A file system that holds the given files, "__" for "/" in their names."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = f"MemTotal:       99999999 kB\nMemAvailable:   {1000 * 1024} kB\n"


def test_the_system_says_what_is_available(tmp_path):
    root = tree(tmp_path, proc__meminfo=MEMINFO)
    assert available_host_bytes(root=root) == 1000 * MIB


@pytest.mark.parametrize("limited", ["", "/pod", "/pod/job"])
def test_a_group_of_version_2_and_its_parents_limit(limited, tmp_path):
    root = tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/pod/job\n")
    for group in ("/pod", "/pod/job"):
        tree(root / f"sys/fs/cgroup{group}", **{"memory.max": "max\n", "memory.current": "5\n"})
    assert available_host_bytes(root=root) == 1000 * MIB
    tree(
        root / f"sys/fs/cgroup{limited}",
        **{
            "memory.max": f"{512 * MIB}\n",
            "memory.current": f"{500 * MIB}\n",
            "memory.stat": f"anon {1 * MIB}\nactive_file {30 * MIB}\ninactive_file {70 * MIB}\n",
        },
    )
    assert available_host_bytes(root=root) == (512 - 500 + 100) * MIB


def test_a_group_of_version_1_limits(tmp_path):
    lines = "12:cpu,cpuacct:/elsewhere\n7:memory:/docker/abc\n0::/\n"
    root = tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup=lines)
    # As in a container: the group has the name that the host knows it by, and is mounted itself.
    tree(
        root / "sys/fs/cgroup/memory",
        **{
            "memory.limit_in_bytes": str(300 * MIB),
            "memory.usage_in_bytes": str(250 * MIB),
            "memory.stat": f"inactive_file 1\ntotal_inactive_file {20 * MIB}\n",
        },
    )
    assert available_host_bytes(root=root) == 70 * MIB
    # What version 1 says where there is no limit.
    tree(root / "sys/fs/cgroup/memory", **{"memory.limit_in_bytes": "9223372036854771712"})
    assert available_host_bytes(root=root) == 1000 * MIB


def test_a_group_over_its_limit_has_nothing_left(tmp_path):
    root = tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    tree(root / "sys/fs/cgroup", **{"memory.max": "5", "memory.current": "9"})
    assert available_host_bytes(root=root) == 0


CHILD = """
import resource, sys
from flexijax.pallas_kernels.host_memory import available_host_bytes

limit, spare = getattr(resource, sys.argv[1]), int(sys.argv[2])
used = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[sys.argv[1]]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
resource.setrlimit(limit, (int(status[used].split()[0]) * 1024 + spare,) * 2)
left = available_host_bytes()
print(left)
bytearray(left // 2)  # it is there
try:
    bytearray(left + 2**25)
except MemoryError:
    print("no more")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux enforces these limits")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_the_limits_of_the_process_are_kept(limit):
    if available_host_bytes() < 400 * MIB:
        pytest.skip("less memory than the test wants to be the lowest limit")
    command = [sys.executable, "-c", CHILD, limit, str(200 * MIB)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left, ended = done.stdout.splitlines()
    assert 190 * MIB < int(left) <= 200 * MIB and ended == "no more"
