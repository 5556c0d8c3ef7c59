"""`flexijax serve` in a process of its own, for what measures it from outside."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that answers at `url`. lines: what it printed."""

    url: str
    process: subprocess.Popen[str]
    lines: list[str]

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.process.pid

    def end(self) -> None:
        """Asks it to end, with SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises subprocess.TimeoutExpired."""
        return self.process.wait(seconds)


@contextlib.contextmanager
def served(options: Sequence[str], *, threads: int) -> Iterator[Served]:
    """Starts `flexijax serve OPTIONS` on a free port, until it answers.

    What it prints is kept out of the way. Ends it with SIGTERM. Raises RuntimeError with the end of
    what it printed where it does not start.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    process = subprocess.Popen(
        [sys.executable, "-m", "flexijax", "serve", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict.fromkeys(names, str(threads)),
    )
    assert process.stderr is not None
    lines: list[str] = []
    try:
        url = None
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"https?://\S+:\d+", line):
                url = found[0]
                break
        if url is None:
            raise RuntimeError("the server did not start:\n" + "".join(lines[-20:]))
        # A pipe that nobody reads fills up, and then whoever writes to it stands still.
        reader = threading.Thread(target=lines.extend, args=(process.stderr,), daemon=True)
        reader.start()
        running = Served(url, process, lines)
        yield running
        running.end()
        running.wait(120)
        reader.join(10)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
