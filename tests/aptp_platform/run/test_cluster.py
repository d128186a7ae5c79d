"""A cluster of one's own: jobs find both packages and the standard library's `platform`; nothing outlives the block."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from ray.job_submission import JobStatus

from aptp_platform.run.cluster import LocalCluster, free_ports, port_is_free

ROOT = Path(__file__).parents[3]
ENTRY = 'python -c "import platform, aptp_platform, aptp; print(platform.system(), aptp_platform.__file__)"'


def test_a_submitted_job_runs_the_uploaded_packages_and_every_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths of the runtime environment are relative to where one submits
    with LocalCluster(num_cpus=1, object_store_bytes=100_000_000) as cluster:
        runtime_env = yaml.safe_load(Path("jobs/runtime_env.yaml").read_text())
        client, job = cluster.submit(ENTRY, runtime_env)
        deadline = time.monotonic() + 120
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.3)
        logs = client.get_job_logs(job)
        assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
        processes = cluster.processes()
        assert len(processes) > 3
    assert "Linux /tmp/aptp-" in logs, "the job imported another copy than the one that was uploaded"
    assert not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert not port_is_free(taken.getsockname()[1])
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(map(port_is_free, ports))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--set", "prune.run.stepz=3"], "error: prune.run.stepz: unknown key; did you mean prune.run.steps?"),
        (["--config", "absent.yaml"], "error: config: absent.yaml does not exist"),
        (["--set", "router.budget=1.5"], "error: router.budget: 1.5: must be"),
    ],
)
def test_the_demo_ends_with_one_line_on_bad_input(arguments: list[str], line: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "examples.emoji.demo", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert run.stdout.startswith(line)
    assert run.stdout.count("\n") == 1


def test_the_demo_refuses_a_busy_port(tmp_path: Path) -> None:
    serve = yaml.safe_load((ROOT / "serve_configs/demo.yaml").read_text())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = serve["http_options"]["port"] = taken.getsockname()[1]
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(serve))
        run = subprocess.run(
            [sys.executable, "-m", "examples.emoji.demo", "--serve-config", str(tmp_path / "serve.yaml")],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert run.returncode == 2
    assert run.stdout.startswith(
        f"error: http_options.port: {port}: another program listens on it; end it, or change it"
    )
