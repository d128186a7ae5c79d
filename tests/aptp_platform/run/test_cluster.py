"""A cluster of one's own: it runs our jobs and no stranger's, beside any other cluster, and nothing of it is left."""

import ipaddress
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
import yaml
from ray.job_submission import JobStatus
from ray.serve.generated.serve_pb2 import ASGIRequest  # type: ignore[attr-defined]

from aptp_platform.run.cluster import ClusterError, LocalCluster, free_ports, port_is_free

ROOT = Path(__file__).parents[3]
ENTRY = (
    'python -c "import platform, aptp_platform, aptp; print(platform.system(), aptp_platform.__file__)" && '
    "! python jobs/cut_experts.py --config jobs/configs/demo.yaml"
)
DEAD = "127.0.0.1:9"  # nobody listens there


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Up although the environment names another cluster and a proxy, and although its first raylet is killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # paths of the runtime environment are relative to where one submits
        patch.setenv("PYTHONPATH", str(ROOT))  # for the server's workers
        patch.setenv("RAY_AUTH_TOKEN", "another")
        patch.setenv("RAY_ADDRESS", DEAD)
        patch.setenv("RAY_API_SERVER_ADDRESS", f"http://{DEAD}")
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
            patch.setenv(name, f"http://{DEAD}")
        patch.delenv("no_proxy", raising=False)
        patch.setattr("aptp_platform.run.cluster.STARTS", 4)  # a busy machine is no failure
        made = LocalCluster(num_cpus=1, object_store_bytes=100_000_000)
        killed: list[psutil.Process] = []
        killer = threading.Thread(target=_kill_a_raylet, args=(made, killed), daemon=True)
        killer.start()
        with made:
            killer.join()
            assert killed
            yield made


def _kill_a_raylet(cluster: LocalCluster, killed: list[psutil.Process]) -> None:
    deadline = time.monotonic() + 240  # a busy machine takes minutes to a raylet
    while not killed and time.monotonic() < deadline:
        for process in cluster.processes():
            with suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    process.kill()
                    killed.append(process)
        time.sleep(0.1)


def test_a_submitted_job_runs_the_uploaded_packages_and_refuses_relative_places(cluster: LocalCluster) -> None:
    runtime_env = yaml.safe_load(Path("jobs/runtime_env.yaml").read_text())
    client, job = cluster.submit(ENTRY, runtime_env)
    deadline = time.monotonic() + 120
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.3)
    logs = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, logs
    assert "Linux /tmp/aptp-" in logs, "the job imported another copy than the one that was uploaded"
    assert "error: root: runs/demo: is relative" in logs


def test_no_port_takes_a_stranger_s_orders(cluster: LocalCluster, tmp_path: Path) -> None:
    """Every port is tried: with a job over HTTP and, where it is open beyond loopback, with a pickle over gRPC."""
    _serve_an_application(cluster)
    proof = tmp_path / "proof"
    wide = []
    for process, host, port in _listeners(cluster):
        for path in ("/api/jobs/", "/api/job_agent/jobs/"):
            for headers in ({}, {"Authorization": "Bearer another"}):
                with suppress(httpx.TransportError):  # most do not speak HTTP
                    answer = httpx.post(
                        f"http://127.0.0.1:{port}{path}", json={"entrypoint": f"touch {proof}"}, headers=headers,
                        timeout=5, trust_env=False,
                    )  # fmt: skip
                    assert "submission_id" not in answer.text, (process.name(), port, path)
        address = ipaddress.ip_address(host)
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
            wide.append(process.name())
            _send_a_pickle(port, proof)
    # What Ray binds to every interface, whatever it is told: the port of a replica that other replicas call.
    assert {name.partition(":echo")[0] for name in wide} == {"ray::ServeReplica"}
    assert not proof.exists()


def test_its_end_is_noticed_and_leaves_nothing(cluster: LocalCluster) -> None:
    processes = set(cluster.processes())
    assert {"raylet", "gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= {
        each.name() for each in processes
    }
    folder = cluster._folder
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    _kill_a_raylet(cluster, [])
    with pytest.raises(ClusterError, match="ray: the cluster of this program has ended: "):
        cluster.submit("true", {})
    cluster.stop()
    assert [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
    assert not folder.exists()


def _listeners(cluster: LocalCluster) -> list[tuple[psutil.Process, str, int]]:
    found = [
        (process, connection.laddr.ip, connection.laddr.port)
        for process in cluster.processes()
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(found) > 8
    return found


def _serve_an_application(cluster: LocalCluster) -> None:
    (port,) = free_ports(1)
    application = {"name": "echo", "import_path": "tests.support.echo_app:app"}
    options = {"host": "127.0.0.1", "port": port}
    cluster.serve().deploy_applications({"http_options": options, "applications": [application]})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            if httpx.get(f"http://127.0.0.1:{port}/", timeout=5, trust_env=False).text == "echo":
                return
        time.sleep(0.3)
    raise AssertionError(cluster.serve().get_serve_details()["applications"])


class _Touch:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[list[str]]]:
        return subprocess.check_call, (["touch", str(self._path)],)


def _send_a_pickle(port: int, proof: Path) -> None:
    order = pickle.dumps(_Touch(proof))
    request = ASGIRequest(pickled_request_metadata=order, request_args=order)
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(request.SerializeToString(), timeout=10)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


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
