"""A Ray cluster of this machine."""

from __future__ import annotations

import os
import secrets
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

from metahpo.searchers.executors.ray_cluster import PATIENCE


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster on this machine that outlives its coordinators; the environment of who is to find it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [shutil.which("ray") or str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={port}", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    environment = {
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        # On the loopback interface alone, and there for those alone who have its token.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **PATIENCE,
    }
    with tempfile.NamedTemporaryFile("w+") as out:
        # A head has no other one's address.
        own = {**os.environ, **environment}
        del own["RAY_ADDRESS"]
        head = subprocess.Popen(command, env=own, stdout=out, stderr=out, start_new_session=True)
        try:
            # The port is open before there is a machine behind it.
            while "Ray runtime started" not in Path(out.name).read_text():
                if head.poll() is not None:
                    raise SystemExit(f"the Ray cluster did not start:\n{Path(out.name).read_text()[-2000:]}")
                time.sleep(0.2)
            yield environment
        finally:
            head.terminate()
            try:
                head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)
                head.wait()
