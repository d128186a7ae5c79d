"""A real S3 server on loopback for the tests: moto's, in an environment of its own, ended by its pid."""

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import botocore.session
import pytest
import s3fs

MOTO_SERVER = Path(__file__).parents[2] / ".venv-s3" / "bin" / "moto_server"


@dataclass(frozen=True)
class S3Server:
    """Where the server listens. `bucket(name)` makes an empty bucket and returns its URI."""

    endpoint: str

    def bucket(self, name: str) -> str:
        s3fs.S3FileSystem(endpoint_url=self.endpoint).mkdir(name)
        return f"s3://{name}"

    def user(self, name: str, allowed: dict[str, str]) -> tuple[str, str]:
        """A new user with one policy statement; returns the key's id and its secret."""
        session = botocore.session.get_session()
        iam = session.create_client("iam", "us-east-1", endpoint_url=self.endpoint)
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="only", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def demand_credentials(self, demanded: bool) -> None:
        """From now on refuse every request whose key the server did not give out, or stop refusing."""
        calls = b"0" if demanded else b"inf"
        headers = {"Content-Type": "text/plain"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", calls, headers)):
            pass


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server for the session; any credentials will do, and `conftest` has put some into the environment."""
    with running_s3_server() as server:
        yield server


@contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """An S3 server on a free port, for the length of the block."""
    if not MOTO_SERVER.exists():
        pytest.fail(f"{MOTO_SERVER} does not exist: make setup builds it", pytrace=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [MOTO_SERVER, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(port, process)
        yield S3Server(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(10)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"moto_server did not listen on port {port} (exit code {process.poll()})", pytrace=False)
