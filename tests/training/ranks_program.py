"""Run as each rank of a process group: calls metahpo with each list of arguments in todo.json, without reports.

RANK.json holds what each rank got of each: [exit code, stdout, stderr].
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

from metahpo import cli, torchrun
from metahpo.training.distributed import process_group


def run(arguments: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    cli._write_report = lambda *_: None
    with process_group():
        results = [run(arguments) for arguments in json.loads(Path("todo.json").read_text())]
    threads = {task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")}
    assert not any("gloo" in thread for thread in threads), f"threads of the process group are left: {threads}"
    Path(f"{torchrun.rank()}.json").write_text(json.dumps(results))
