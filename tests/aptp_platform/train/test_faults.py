"""What a cluster does to a run: nodes are lost, disks fill up. Each fault really happens here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray.cloudpickle

from aptp_platform.storage.store import Store
from aptp_platform.train.trainer import fit
from tests.support import toy_spec, two_nodes
from tests.support.toy_spec import losses_of, toy

ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
ray.cloudpickle.register_pickle_by_value(toy_spec)


@pytest.mark.usefixtures("local_ray")
def test_a_node_that_dies_changes_nothing_and_its_notice_saved_what_was_not_saved_yet(tmp_path: Path) -> None:
    watcher = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.2"}
    environment = {**os.environ, "PYTHONPATH": PATHS, **watcher}
    killed = subprocess.run(
        [sys.executable, two_nodes.__file__, str(tmp_path / "killed")],
        env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr[-3000:]
    alone = toy(tmp_path / "alone", steps=two_nodes.STEPS, workers=2)
    undisturbed = fit(alone, Store.open(alone.folder), "run")
    assert json.loads(killed.stdout.splitlines()[-1]) == undisturbed
    ((expected,), (before, after)) = losses_of(alone.folder), losses_of(tmp_path / "killed")
    assert before == expected[: len(before)]
    assert after == expected[-len(after) :]
    assert two_nodes.STEPS - len(after) in (30, 40, 50), "from the checkpoint that the notice asked for"


FILL = """
import numpy, ray
from aptp_platform.run.job import run_function
ray.init(address="local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
ray.init = lambda *args, **options: None  # the job joins this cluster
held = []
run_function(lambda config: [held.append(ray.put(numpy.zeros(30_000_000, numpy.uint8))) for _ in range(6)], "", [
    "--config", "jobs/configs/demo.yaml"])
"""


def test_a_full_spill_disk_is_one_line() -> None:
    """Ray calls a disk full from a share on that is configured; here the one that there is lies above it."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "RAY_local_fs_capacity_threshold": "0.0001"}
    run = subprocess.run(
        [sys.executable, "-c", FILL],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert run.returncode == 2, run.stderr[-2000:]
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ray: the object store of a node is full, and so is the disk that it spills to: make")
