"""A listing is whole or it raises; an empty one is told from one that failed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path

import pytest

from aptp_platform.config import StorageConfig
from aptp_platform.storage.errors import StoreError
from aptp_platform.storage.store import Store
from tests.support.fault_proxy import FaultProxy
from tests.support.s3_server import S3Server


def test_a_part_that_cannot_be_listed_fails_the_whole(fault_proxy: FaultProxy) -> None:
    storage = StorageConfig(endpoint=fault_proxy.endpoint, attempts=1)
    store = Store.open(f"{S3Server(fault_proxy.endpoint).bucket('listed')}/data", storage)
    patterns = ["*/train-*", "train-*", "**/train-*", "**"]
    assert [store.list(pattern) for pattern in patterns] == [[]] * 4, "there is nothing yet"
    for each in ("train-0", "a/train-1", "b/train-2", "c/d/train-3"):
        store.write_json(each, 0)
    for pattern, status in product(patterns, (403, 503)):
        fault_proxy.refuse = partial(refusal, status, "prefix=data")
        with pytest.raises(StoreError, match=r"s3://"):
            store.list(pattern)
        fault_proxy.refuse = partial(refusal, status, "prefix=data%2Fb")
        if pattern == "*/train-*":
            with pytest.raises(StoreError, match=r"s3://"):
                store.list(pattern)
        else:
            assert store.list(pattern), "no other pattern asks for that folder alone"


def refusal(status: int, listed: str, method: str, path: str) -> int | None:
    return status if listed in path else None


@pytest.mark.parametrize("pattern", ["*/train-*", "**"])
def test_a_folder_that_may_not_be_read_is_no_empty_one(pattern: str) -> None:
    with tempfile.TemporaryDirectory() as folder, as_nobody(folder):
        store = Store.open(folder)
        for each in ("a/train-0", "b/train-1"):
            store.write_json(each, 0)
        Path(folder, "b").chmod(0)
        try:
            with pytest.raises(StoreError, match="access denied"):
                store.list(pattern)
        finally:
            Path(folder, "b").chmod(0o755)


@contextmanager
def as_nobody(folder: str) -> Iterator[None]:
    """Root may read everything."""
    if os.getuid() != 0:
        yield
        return
    os.chown(folder, 65534, -1)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_links_are_followed_and_one_that_leads_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train-0").write_text("x")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "itself").symlink_to(root)
    (root / "train-1").symlink_to(tmp_path / "absent")
    store = Store.open(root)
    assert store.list() == ["linked/train-0", "train-1"]
    with pytest.raises(StoreError, match=r"train-1: does not exist"), store.open_file("train-1"):
        pass
