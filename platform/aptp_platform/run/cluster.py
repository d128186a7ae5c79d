"""A Ray cluster for this program alone: on free loopback ports, with its own token, and ended completely.

It runs beside any other cluster on this machine, and ignores one that the environment names.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import psutil
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.job_submission import JobSubmissionClient

from aptp_platform.run import keeper
from aptp_platform.run.job import LOOPBACK

_MARK = "APTP_CLUSTER"
ONE_MACHINE = {
    "RAY_worker_niceness": "0",  # Ray lowers its workers' priority; beside any busy process they would hardly run
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # at its default of 0.1 the controller takes a twentieth of a core
}
# These name another cluster or another token, and Ray prefers them to its arguments.
_ANOTHER_CLUSTER = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_AUTH_TOKEN")
_HOSTS = "127.0.0.1,localhost"  # never through a proxy
# On a busy machine a raylet gives up when its agent takes more than 15 s to start, for which Ray has no setting; later
# starts find the agent's files in memory.
STARTS = 3
START_SECONDS = 90.0
STOP_SECONDS = 2 * keeper.GRACE_SECONDS + 2


class ClusterError(Exception):
    """The cluster did not start, or has ended; the message is one line that says which."""


class LocalCluster:
    """A head node as a child process, for the length of a `with` block.

    Leaving the block ends every process that Ray started, and no others; so does the end of this process, even by
    SIGKILL. An error that leaves the block because the cluster has ended leaves it as a `ClusterError`.

    Args:
        num_cpus: logical CPUs. More than the machine has lets data tasks run beside workers that hold a CPU each.
        object_store_bytes: shared memory for objects.
    """

    def __init__(self, num_cpus: int, object_store_bytes: int) -> None:
        self.num_cpus = num_cpus
        self.object_store_bytes = object_store_bytes
        self._mark = uuid.uuid4().hex
        self._token = secrets.token_hex(32)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._raylet: psutil.Process | None = None

    @property
    def address(self) -> str:
        """What `ray.init(address=...)` and RAY_ADDRESS take."""
        return f"127.0.0.1:{self._port}"

    @property
    def dashboard(self) -> str:
        """What `ray job submit --address` and `serve deploy --address` take."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the dashboard must carry."""
        return {"Authorization": f"Bearer {self._token}"}

    def __enter__(self) -> "LocalCluster":
        for left in reversed(range(STARTS)):
            self._start()
            try:
                self._wait()
                break
            except BaseException as error:
                self.stop()
                if not (left and isinstance(error, ClusterError)):
                    raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, ClusterError):
                self.require_alive(cause=error)
        finally:
            self.stop()

    def jobs(self) -> JobSubmissionClient:
        """A client of this cluster, whichever one the environment names."""
        with _without(_ANOTHER_CLUSTER):
            return _Jobs(self.dashboard, headers=self.headers)

    def serve(self) -> ServeSubmissionClient:
        """What `serve deploy` and `serve status` work with."""
        return _Serve(self.dashboard, headers=self.headers)

    def submit(self, entrypoint: str, runtime_env: dict[str, Any]) -> tuple[JobSubmissionClient, str]:
        """What `ray job submit --no-wait` does; returns a client and the job's name."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client = self.jobs()
                return client, client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            except (OSError, RuntimeError) as error:
                self.require_alive(cause=error)
                # The dashboard answers before it knows of the node's agent.
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def require_alive(self, cause: Exception | None = None) -> None:
        """ClusterError if the head or its raylet has ended; after a `cause`, wait a moment for that to show."""
        deadline = time.monotonic() + (3.0 if cause is not None else 0.0)
        while not (ended := self._ended()):
            if time.monotonic() >= deadline:
                return
            time.sleep(0.2)
        raise ClusterError(f"ray: the cluster of this program has ended: {ended}; start the program again") from cause

    def stop(self) -> None:
        """End every process of this cluster; safe to call twice."""
        if self._keeper is None:
            return
        assert self._keeper.stdin is not None  # it was started with a pipe
        self._keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(STOP_SECONDS)
        # Nothing is left, unless the keeper itself was killed.
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
        self._keeper.wait()
        self._keeper = self._raylet = None
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Every living process of this cluster.

        Ray's agents overwrite their environment, and with it the mark, but stay in the keeper's session; jobs have
        sessions of their own, but keep the mark.
        """
        if self._keeper is None:
            return []
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
                ours = os.getsid(process.pid) == self._keeper.pid or process.environ().get(_MARK) == self._mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _start(self) -> None:
        self._port, self._dashboard_port, client, self._agent_port, agent_grpc, metrics = free_ports(6)
        # Short, since Ray puts Unix sockets below it and their paths are limited to 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="aptp-", dir="/tmp"))
        self._log: IO[bytes] = (self._folder / "start.log").open("w+b")  # to be read when the folder is gone
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(self._token)
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
            "--node-ip-address=127.0.0.1", f"--port={self._port}", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self._dashboard_port}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={self._agent_port}", f"--dashboard-agent-grpc-port={agent_grpc}",
            f"--metrics-export-port={metrics}", f"--num-cpus={self.num_cpus}",
            f"--object-store-memory={self.object_store_bytes}", f"--temp-dir={self._folder}",
        ]  # fmt: skip
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", keeper.__file__, str(self._folder), *command],
            env=self._environment(token), stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def _environment(self, token: Path) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in _ANOTHER_CLUSTER}
        environment |= ONE_MACHINE | LOOPBACK | {_MARK: self._mark}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        # Jobs look `python` up on the PATH of the node that runs them: it must be this environment's.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        direct = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), _HOSTS)))
        return environment | {"no_proxy": direct, "NO_PROXY": direct}

    def _wait(self) -> None:
        """Wait until the head accepts jobs: its dashboard answers, and the agent, which shows that the raylet runs."""
        deadline = time.monotonic() + START_SECONDS
        urls = (f"{self.dashboard}/api/version", f"http://127.0.0.1:{self._agent_port}/api/local_raylet_healthz")
        with httpx.Client(headers=self.headers, timeout=2, trust_env=False) as client:
            while time.monotonic() < deadline:
                if ended := self._ended():
                    raise ClusterError(f"ray: the head ended while it started: {ended}; its last words: {self._said()}")
                with contextlib.suppress(httpx.TransportError):
                    if self._raylet is not None and all(client.get(url).is_success for url in urls):
                        return
                time.sleep(0.3)
        raise ClusterError(f"ray: the head did not answer within {START_SECONDS:.0f} s; its last words: {self._said()}")

    def _ended(self) -> str:
        """How the head has ended, or "". `ray start` keeps running after its raylet ends with exit code 0."""
        assert self._keeper is not None  # callers are inside the block
        if self._keeper.poll() is not None:
            return f"`ray start` returned {self._keeper.returncode}"
        if self._raylet is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Its children have the same name for a moment; the raylet is the oldest.
                raylets = [each for each in self.processes() if each.name() == "raylet"]
                self._raylet = min(raylets, key=psutil.Process.create_time, default=None)
            return ""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._raylet.is_running() and self._raylet.status() != psutil.STATUS_ZOMBIE:
                return ""
        return "its raylet is gone"

    def _said(self) -> str:
        self._log.seek(0)
        return " ".join(self._log.read().decode(errors="replace").split()[-40:])


class _Jobs(JobSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, proxies={"no_proxy": _HOSTS}, **options)


class _Serve(ServeSubmissionClient):
    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, proxies={"no_proxy": _HOSTS}, **options)


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that are free now, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of the loopback interface now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
