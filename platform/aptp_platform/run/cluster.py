"""A Ray cluster of this program's own: started on free ports of this machine, ended whole, beside any other cluster."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from ray.job_submission import JobSubmissionClient

_MARK = "APTP_CLUSTER"
ONE_MACHINE = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",  # Ray makes its workers nice; beside any busy process they would then hardly run
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # at its default of 0.1 the controller takes a twentieth of a core
}
START_SECONDS = 90.0
STOP_SECONDS = 8.0


class LocalCluster:
    """A head node as a child process, for the length of a `with` block.

    Every process that Ray starts inherits a mark in its environment; leaving the block ends all that carry it, also
    those that were given to another parent, and no others.

    Args:
        num_cpus: logical CPUs. More than the machine has lets data tasks run beside workers that hold a CPU each.
        object_store_bytes: shared memory for objects.
    """

    def __init__(self, num_cpus: int, object_store_bytes: int) -> None:
        self.num_cpus = num_cpus
        self.object_store_bytes = object_store_bytes
        self._mark = uuid.uuid4().hex
        # Short, since Ray puts Unix sockets below it and their paths are limited to 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="aptp-", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What `ray.init(address=...)` and RAY_ADDRESS take."""
        return f"127.0.0.1:{self._port}"

    @property
    def dashboard(self) -> str:
        """What `ray job submit --address` and `serve deploy --address` take."""
        return f"http://127.0.0.1:{self._dashboard_port}"

    def __enter__(self) -> "LocalCluster":
        self._port, self._dashboard_port, client, agent, agent_grpc, metrics = free_ports(6)
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
            f"--port={self._port}", f"--dashboard-port={self._dashboard_port}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}",
            f"--num-cpus={self.num_cpus}", f"--object-store-memory={self.object_store_bytes}",
            f"--temp-dir={self._folder}",
        ]  # fmt: skip
        # Jobs look `python` up on the PATH of the node that runs them: the one of this very environment.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        environment = {**os.environ, **ONE_MACHINE, _MARK: self._mark, "PATH": path}
        environment.pop("RAY_ADDRESS", None)
        self._log = (self._folder / "start.log").open("wb")
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def submit(self, entrypoint: str, runtime_env: dict[str, Any]) -> tuple[JobSubmissionClient, str]:
        """What `ray job submit --no-wait` does; returns a client and the job's name."""
        client = JobSubmissionClient(self.dashboard)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return client, client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)
            except RuntimeError as error:  # the dashboard answers before the node's agent does
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def stop(self) -> None:
        """End every process of this cluster; safe to call twice."""
        for process in self.processes():
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in alive:
            _signal(process, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self) -> None:
        assert self._process is not None  # it was just started
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        tail = " ".join((self._folder / "start.log").read_text(errors="replace").split()[-40:])
        raise ValueError(f"the Ray head did not answer within {START_SECONDS:.0f} s; its last words: {tail}")

    def processes(self) -> list[psutil.Process]:
        """Every living process of this cluster."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self._mark:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found


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


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
