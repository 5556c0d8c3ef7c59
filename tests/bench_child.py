"""What `test_bench` starts as a process of its own: takes memory, says what it sees."""

import json
import os
import sys

from bench.timing import peak_bytes

spec = json.loads(sys.argv[1])
if spec["megabytes"] < 0:
    raise SystemExit("megabytes must not be negative")
held = b"x" * (spec["megabytes"] * 1_000_000)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
print("the last line counts")
print(
    json.dumps(
        {"peak_bytes": peak_bytes(), "cores": cores, "threads": os.environ["OMP_NUM_THREADS"]}
    )
)
