"""A job that runs in a copy of the working directory takes no place that is relative to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aptp_platform.config import ConfigError
from aptp_platform.config_file import load_config, places
from aptp_platform.run.job import require_lasting

ROOT = Path(__file__).parents[3]
COPY = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1")


@pytest.mark.parametrize("field", ["root", "data.source", "model.pipeline", "model.text_encoder"])
def test_a_relative_place_is_refused_in_a_submitted_job_alone(field: str) -> None:
    bucket = ROOT / "jobs/configs/bucket.yaml"
    require_lasting(load_config(bucket), COPY)
    require_lasting(load_config(bucket, [f"{field}=/shared/folder"]), COPY)
    relative = load_config(bucket, [f"{field}=some/folder"])
    assert places(relative)[field] == "some/folder"
    require_lasting(relative, ROOT)
    with pytest.raises(ConfigError, match=rf"^{field}: some/folder: is relative.*--set {field}=s3://bucket/key$"):
        require_lasting(relative, COPY)


ALONE = """
import os, psutil, ray, signal, sys, time
from aptp_platform.run.job import run_function
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store
signal.signal(signal.SIGINT, signal.default_int_handler)  # what started this suite may have it ignored
def look(config):
    print("PLACE", config.root)
    print("MODE", os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"]))
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                print("LISTENS", connection.laddr.ip)
    with Lease(Store.open(sys.argv[1]), "run"):
        print("HOLDS", Store.open(sys.argv[1]).list(), flush=True)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
run_function(look, "", ["--config", "jobs/configs/demo.yaml"])
"""


def test_a_script_that_is_started_directly_listens_to_this_machine_alone_and_wants_a_token(tmp_path: Path) -> None:
    """And ^C ends it in one line, without a lease that others must wait for."""
    theirs = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    environment = {name: value for name, value in os.environ.items() if name not in theirs}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 130, run.stderr[-2000:]
    assert run.stderr.endswith("error: interrupted; submit the job again to go on\n")
    assert "HOLDS ['leases/run.json']" in run.stdout
    assert not list(tmp_path.rglob("*.json"))
    said = [line.split(" ", 1) for line in run.stdout.splitlines() if line.startswith(("PLACE", "MODE", "LISTENS"))]
    assert ["PLACE", str(ROOT / "runs/demo")] in said
    assert ["MODE", "token 64"] in said
    heard = {address for name, address in said if name == "LISTENS"}
    assert heard
    assert heard <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
