"""What holds for every test: quiet single-threaded numerics, a local Ray that phones nobody, and the shared servers."""

import os
import secrets

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # Ray's ports take our orders alone
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # and listen on loopback, whatever network the machine is in
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "aptp_platform.serve.http.connections:limit_connections"
os.environ.update(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing", AWS_DEFAULT_REGION="us-east-1")
os.environ.setdefault("RAY_worker_niceness", "0")  # at its default of 15 a busy machine starves them
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process for each worker group
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from tests.support.fault_proxy import fault_proxy
from tests.support.local_ray import local_ray
from tests.support.s3_server import s3_server

# A busy machine is no failure.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

__all__ = ["fault_proxy", "local_ray", "s3_server"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="load and faults as long as `make soak` wants them")


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def served(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A `served.Served`. `test_serve_faults` is its last user and ends it, for the sake of later tests."""
    from tests.support.served import serving  # imports `aptp`, and the shape checks must be in place before

    with serving(tmp_path_factory.mktemp("serve")) as made:
        yield made
