"""One run at a time on one root; what a dead one leaves behind is taken over."""

import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aptp_platform.config import StorageConfig
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.lease import Lease, LeaseError
from aptp_platform.storage.store import Store
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server

HOLD = """
import sys, time
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store
with Lease(Store.open(sys.argv[1]), "prune", beat_s=0.1, dead_s=1.0):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path)
    server: S3Server = request.getfixturevalue("s3_server")
    return Store.open(
        f"{server.bucket(tmp_path.name.replace('_', '-').strip('-'))}/run", StorageConfig(endpoint=server.endpoint)
    )


def lease(store: Store, name: str = "prune") -> Lease:
    return Lease(store, name, beat_s=0.1, dead_s=1.0)


def test_the_second_is_refused_and_comes_after_the_first(store: Store) -> None:
    with lease(store) as first:
        with pytest.raises(
            LeaseError, match=r"prune: another run works on it \(process \d+ on .+\): wait for it, [^\n]+$"
        ):
            lease(store).__enter__()
        with lease(store, "finetune"):
            first.require()
    with lease(store) as second:
        second.require()
    assert store.list() == []


def take_away(store: Store) -> None:
    store.write_json("leases/prune.json", {"id": "another", "host": "there", "process": 3})


def test_one_that_was_taken_away_ends_its_block(store: Store) -> None:
    began = time.monotonic()
    with pytest.raises(LeaseError, match="process 3 on there"):
        hold_and_lose(store)
    store.remove("leases/prune.json")
    with ThreadPoolExecutor(1) as threads, pytest.raises(LeaseError, match="process 3 on there"):
        threads.submit(hold_and_lose, store).result()
    assert store.list() == ["leases/prune.json"], "it is the other's now"
    assert time.monotonic() - began < 20


def hold_and_lose(store: Store) -> None:
    with lease(store):
        take_away(store)
        while True:  # as a job does: it waits, and computes
            time.sleep(0.01)


DEAF = """
import signal, sys, time
from aptp_platform.storage.lease import Lease
from aptp_platform.storage.store import Store
signal.signal(signal.SIGINT, signal.SIG_IGN)
store = Store.open(sys.argv[1])
with Lease(store, "prune", beat_s=0.1, grace_s=0.5):
    store.write_json("leases/prune.json", {"id": "another", "host": "there", "process": 3})
    time.sleep(60)
"""


def test_a_process_that_does_not_hear_that_its_lease_is_lost_is_ended(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", DEAF, str(tmp_path)], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: .*prune: another run works on it \(process 3 on there\): [^\n]+\n", ended.stderr)


@pytest.mark.parametrize("left", [False, True])
def test_of_many_that_start_at_once_one_has_it(store: Store, left: bool) -> None:
    if left:
        take_away(store)
    barrier, held = threading.Barrier(8), threading.Event()

    def start(number: int) -> bool:
        own = Lease(store, "prune", beat_s=0.1, dead_s=0.3)
        barrier.wait()
        try:
            with own:
                held.wait(1.0)
                return True
        except LeaseError:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(start, range(8))) == 1


def test_what_a_killed_run_leaves_is_free_at_once_and_elsewhere_after_a_while(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LeaseError, match=f"process {process.pid} on"):
            lease(store).__enter__()
        process.kill()
        left = store.read_json("leases/prune.json")
        began = time.monotonic()
        with Lease(store, "prune", dead_s=30) as held:  # its parent has not even noticed yet
            held.require()
        assert time.monotonic() - began < 5
    store.write_json("leases/prune.json", {**left, "machine": "another"})
    began = time.monotonic()
    with lease(store) as held:
        held.require()
    assert 0.9 < time.monotonic() - began < 5


FULL = """
import sys, time
from pathlib import Path
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.lease import Lease, LeaseError
from aptp_platform.storage.store import Store
store = Store.open(sys.argv[1])
with Lease(store, "prune", beat_s=0.1, dead_s=1.0) as held:
    try:
        with store.open_file("filler", "wb") as stream:
            stream.write(bytes(1 << 20))
    except StoreError as error:
        print(error)
    Path(sys.argv[1], "rest").open("wb", buffering=0).write(bytes(1 << 20))
    try:
        Lease(store, "prune", beat_s=0.1, dead_s=1.0).__enter__()
    except LeaseError as error:
        print(error)
    held.require()
"""


def test_a_full_disk_is_one_line_and_loses_no_lease(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=128k none {tmp_path} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, text=True, timeout=60)
    if run.returncode and "Traceback" not in run.stderr:
        pytest.skip("no name space of its own may be made here, and no small disk mounted in it")
    assert run.returncode == 0, run.stderr
    full, refused = run.stdout.splitlines()
    assert full == f"{tmp_path}/filler: No space left on device: make room, or name another place"
    assert "prune: another run works on it" in refused


def test_credentials_that_are_revoked_for_a_while_lose_no_lease(s3_server: S3Server) -> None:
    store = Store.open(f"{s3_server.bucket('revoked')}/run", StorageConfig(endpoint=s3_server.endpoint))
    with lease(store) as held:
        s3_server.demand_credentials(True)
        try:
            with pytest.raises(StoreError, match="access denied"):
                store.write_json("a", 1)
            time.sleep(1.5)
        finally:
            s3_server.demand_credentials(False)
        with pytest.raises(LeaseError, match="another run works on it"):
            lease(store).__enter__()
        held.require()
    assert store.list() == []


def test_a_store_that_knows_no_conditions_is_named(
    fault_proxy: FaultProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault_proxy.dropped = ("if-none-match", "if-match")
    bucket = S3Server(fault_proxy.endpoint).bucket("unconditional")
    store = Store.open(bucket, StorageConfig(endpoint=fault_proxy.endpoint))
    with lease(store) as held:
        with pytest.raises(LeaseError, match="another run works on it"):
            lease(store).__enter__()
        held.require()
    assert "s3://unconditional: prune: this store ignores If-None-Match" in capsys.readouterr().err
