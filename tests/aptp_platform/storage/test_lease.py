"""One run at a time on one root; what a dead one leaves behind is taken over."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aptp_platform.config import StorageConfig
from aptp_platform.storage.lease import Lease, LeaseError
from aptp_platform.storage.store import Store
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


def test_one_that_was_taken_away_says_so(store: Store) -> None:
    with lease(store) as held:
        store.write_json("leases/prune.json", {"id": "another", "host": "there", "process": 3})
        with pytest.raises(LeaseError, match="process 3 on there"):
            held.require()
    assert store.list() == ["leases/prune.json"], "it is the other's now"


def test_one_that_changes_or_ends_while_it_is_looked_at(store: Store) -> None:
    ended = threading.Event()
    beats = [{"id": "another", "beats": beat} for beat in range(3)]

    def come_and_go() -> None:
        while not ended.is_set():
            for beat in beats:
                store.write_json("leases/prune.json", beat)
            store.remove("leases/prune.json")

    with ThreadPoolExecutor(1) as threads:
        going = threads.submit(come_and_go)
        try:
            found = [lease(store)._read()]
            while len(found) < 300 or not any(found):
                found.append(lease(store)._read())
        finally:
            ended.set()
        going.result()
    assert all(each is None or each in beats for each in found)


def test_what_a_killed_run_leaves_is_taken_over(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(LeaseError):
            lease(store).__enter__()
        process.kill()
    assert store.exists("leases/prune.json")
    started = time.monotonic()
    with lease(store) as held:
        held.require()
    assert time.monotonic() - started < 10
