"""A Ray cluster of this machine."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# With it in its environment a process of Ray listens on the loopback interface alone.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def cluster() -> Iterator[str]:
    """A Ray cluster on this machine that outlives its coordinators; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [shutil.which("ray") or str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    # The time is for machines with much else to do.
    environment = {"RAY_raylet_start_wait_time_s": "120", **os.environ, **LOOPBACK}
    with tempfile.NamedTemporaryFile("w+") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            # The port is open before there is a machine behind it.
            while "Ray runtime started" not in Path(out.name).read_text():
                if head.poll() is not None:
                    raise SystemExit(f"the Ray cluster did not start:\n{Path(out.name).read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()
