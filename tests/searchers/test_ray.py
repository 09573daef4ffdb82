from __future__ import annotations

import os
import signal
import time
from importlib.util import find_spec

import pytest

from metahpo.errors import SearchError
from metahpo.searchers import Grid, Int, Ray, Space, Study

if find_spec("ray") is None:
    pytest.skip("Ray is an extra", allow_module_level=True)


class Fuse:
    """Can be read in another process until a file is there."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return eval, (f"1 // (not __import__('os').path.exists({str(self.path)!r}))",)


def test_a_search_on_a_cluster_of_its_own(tmp_path, monkeypatch):
    """Each trial by its number, in one search, for a cluster takes seconds to start."""
    import ray

    # A cluster that is named here is not the one meant.
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    burnt, done = tmp_path / "burnt", tmp_path / "done"
    done.mkdir()
    fuse = Fuse(burnt)

    def objective(trial):
        import torch

        assert fuse
        if trial.number == 0:
            for step in range(500):
                trial.report(step, step / 2)
        elif trial.number == 1:
            (done / "1").touch()
            raise KeyError("one")
        elif trial.number == 2:
            kept = trial.folder / "kept"
            if trial.attempt == 0:
                kept.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
            assert kept.read_text() == "half"
        elif trial.number == 4:
            while len(os.listdir(done)) < 4:
                time.sleep(0.01)
            burnt.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (done / str(trial.number)).touch()
        return 10 * torch.get_num_threads() + int(os.environ["OMP_NUM_THREADS"])

    seen = []

    def look(record):
        seen.append(record)
        if len(seen) == 1:
            assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
            with pytest.raises(
                SearchError, match=r"^executor ray: 2 workers of 0.5 GPU each need 1, the cluster has 0$"
            ):
                Ray(2, threads=1, gpus=0.5).start(objective, None)
            with pytest.raises(SearchError, match=r"^executor ray: 3 workers of 1 CPU each need 3, the cluster has 2$"):
                Ray(3, threads=1).start(objective, None)

    environment = dict(os.environ)
    with Study(Space(n=Int(0, 4)), Grid(), tmp_path / "study.db") as study:
        with pytest.raises(SearchError) as refusal:
            study.optimize(objective, workers=Ray(2, threads=1), on_trial=look)
        if "timed out during startup" in str(refusal.value) and os.getloadavg()[0] > 3 * (os.cpu_count() or 1):
            pytest.skip("Ray gives its own processes a fixed time to start, too short on a machine as busy as this")
        assert str(refusal.value).startswith("the objective cannot be read in another process: ZeroDivisionError")
        assert not ray.is_initialized()
        assert dict(os.environ) == environment
        # What had ended has; the rest is gone on with elsewhere.
        study.optimize(lambda trial: 2.0)
        assert [t.score for t in study.trials] == [11, None, 11, 11, 2]
        assert study.trials[0].reports == {step: step / 2 for step in range(500)}
        assert "Traceback" in study.trials[1].error
        assert [t.deaths for t in study.trials][:4] == [0, 0, 1, 0]


def test_bad_input(monkeypatch):
    for gpus in (-1, True, "1", float("nan")):
        with pytest.raises(SearchError, match=r"^Ray: gpus should be a .*number of at least 0, found"):
            Ray(1, gpus=gpus)
    with Study(Space(n=Int(0, 4))) as study:
        with pytest.raises(SearchError, match=r"^executor ray: no cluster at '127.0.0.1:1': .*refused"):
            study.optimize(lambda trial: 1.0, 1, Ray(1, address="127.0.0.1:1"))
        monkeypatch.setitem(__import__("sys").modules, "ray", None)
        with pytest.raises(SearchError, match=r'^executor ray: Ray is not installed; pip install "metahpo\[ray\]"$'):
            study.optimize(lambda trial: 1.0, 1, Ray(1))
