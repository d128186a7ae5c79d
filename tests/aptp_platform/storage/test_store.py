"""One store, the same laws on a disk and in a bucket; and one line for everything that cannot be used."""

import importlib.util
import pickle
import threading
import time

import pytest
import ray.data

from aptp_platform.config import StorageConfig
from aptp_platform.storage.errors import MissingError, StoreError
from aptp_platform.storage.store import Store
from tests.support.s3_server import S3Server


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return Store.open(tmp_path / "root")
    server: S3Server = request.getfixturevalue("s3_server")
    name = f"storage-{tmp_path.name.replace('_', '-')}".lower().strip("-")
    return Store.open(f"{server.bucket(name)}/some/prefix", StorageConfig(endpoint=server.endpoint))


def write(store: Store, name: str, text: str = "x") -> None:
    with store.open_file(name, "wb") as stream:
        stream.write(text.encode())


def read(store: Store, name: str) -> str:
    with store.open_file(name) as stream:
        return stream.read().decode()


def test_what_is_written_is_read_and_listed(store):
    assert not store.exists()
    assert store.list() == []
    for name in ("train-00.tar", "train-01.tar.gz", "test-00.tar", "deep/er/train-02.tar"):
        write(store, name, name)
    assert read(store, "deep/er/train-02.tar") == "deep/er/train-02.tar"
    assert store.list("train-*") == ["train-00.tar", "train-01.tar.gz"]
    assert store.list("*/*/train-*") == ["deep/er/train-02.tar"]
    assert store.list("**/train-*") == ["deep/er/train-02.tar", "train-00.tar", "train-01.tar.gz"]
    assert store.list() == ["deep/er/train-02.tar", "test-00.tar", "train-00.tar", "train-01.tar.gz"]
    assert store.exists()
    assert store.exists("deep")
    assert store.exists("test-00.tar")
    assert store.join("deep", "er").list() == ["train-02.tar"]


def test_json_and_pickle_round_trips(store):
    store.write_json("a/stage.json", {"rows": 3})
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.read_json("a/stage.json") == {"rows": 3}
    with pytest.raises(MissingError):
        again.read_json("absent.json")
    write(store, "bad.json", "{")
    with pytest.raises(StoreError, match=r"bad\.json: is not JSON"):
        store.read_json("bad.json")


def test_a_write_that_fails_leaves_the_old_file(store):
    write(store, "a", "old")
    with pytest.raises(TypeError), store.open_file("a", "wb") as stream:
        stream.writelines([b"new", None])
    assert read(store, "a") == "old"
    assert store.list() == ["a"]


def test_publish_replaces_the_whole_folder_and_fetch_brings_it_back(store, tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "weights").write_text("w")
    (source / "stage.json").write_text("{}")
    write(store, "out/stale")
    store.publish(source, "out")
    assert store.list() == ["out/inner/weights", "out/stage.json"]
    folder = store.fetch("out", tmp_path / "fetched")
    assert (folder / "inner" / "weights").read_text() == "w"
    assert store.fetch("out/stage.json", tmp_path / "fetched").read_text() == "{}"
    store.move("out", "moved")
    assert store.list() == ["moved/inner/weights", "moved/stage.json"]
    store.remove("moved")
    store.remove("moved")
    assert not store.exists("moved")
    with pytest.raises(StoreError, match="will not remove the folder itself"):
        store.remove("/")


def test_a_fingerprint_changes_with_the_content_and_only_with_it(store):
    write(store, "a", "1")
    write(store, "b", "1")
    before = store.fingerprint()
    assert before == store.fingerprint()
    assert store.fingerprint("a") != store.fingerprint("b")
    time.sleep(0.02)
    write(store, "b", "2")
    assert store.fingerprint() != before


def test_arrow_reads_what_the_store_wrote(store):
    write(store, "a.txt", "hello")
    filesystem, path = store.arrow()
    with filesystem.open_input_stream(f"{path}/a.txt") as stream:
        assert stream.read() == b"hello"


def test_ray_data_writes_through_it(store, local_ray):
    filesystem, path = store.arrow()
    ray.data.range(5).write_parquet(f"{path}/numbers", filesystem=filesystem)
    assert ray.data.read_parquet(f"{path}/numbers", filesystem=filesystem).count() == 5


def test_require_names_what_is_wrong(store):
    with pytest.raises(StoreError, match=r"does not exist; .*'train-\*': change data.source"):
        store.require("train-*", "data.source")
    write(store, "readme")
    with pytest.raises(StoreError, match=r"no file matches 'train-\*'; it holds readme: change data.train"):
        store.require("train-*", "data.train")
    with pytest.raises(StoreError, match=r"absent: does not exist"):
        store.fetch("absent", "/nowhere")
    with pytest.raises(StoreError, match=r"absent: does not exist"):
        read(store, "absent")


def test_an_empty_local_folder_says_so(tmp_path):
    with pytest.raises(StoreError, match="holds no files"):
        Store.open(tmp_path).require("*", "data.source")


def test_a_relative_path_is_made_absolute_and_file_uris_are_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.open("runs/a").uri == str(tmp_path / "runs/a")
    assert Store.open(f"file://{tmp_path}/with%20space").uri == f"{tmp_path}/with space"


def test_an_endpoint_where_nobody_listens_fails_soon():
    store = Store.open("s3://bucket/a", StorageConfig(endpoint="http://127.0.0.1:9"))
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"s3://bucket/a: not reachable at storage.endpoint http://127.0.0.1:9 \("):
        store.reach()
    assert time.monotonic() - start < 30


def test_refused_credentials_are_named_and_not_shown(s3_server, monkeypatch):
    store = Store.open(s3_server.bucket("guarded"), StorageConfig(endpoint=s3_server.endpoint))
    s3_server.demand_credentials(True)
    try:
        with pytest.raises(StoreError, match=r"s3://guarded: access denied .*credentials") as caught:
            store.require("*", "data.source")
    finally:
        s3_server.demand_credentials(False)
    assert "testing" not in str(caught.value)
    store.join("now").write_json("a", 1)


def test_credentials_that_may_not_list(s3_server, monkeypatch):
    store = Store.open(s3_server.bucket("unlisted"), StorageConfig(endpoint=s3_server.endpoint, region="us-east-2"))
    identity, secret = s3_server.user("reader", {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", identity)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3_server.demand_credentials(True)
    try:
        with pytest.raises(
            StoreError, match=r"s3://unlisted/a: access denied .* the bucket's policy lets them list"
        ) as caught:
            store.join("a").reach()
    finally:
        s3_server.demand_credentials(False)
    assert secret not in str(caught.value)


def test_a_bucket_that_fails_for_a_while_is_asked_again(fault_proxy):
    server = StorageConfig(endpoint=fault_proxy.endpoint, timeout_s=0.5)
    store = Store.open(f"{S3Server(fault_proxy.endpoint).bucket('faults')}/a", server)
    for fault in ("503", "reset", "stall"):
        fault_proxy.fault = fault
        healing = threading.Timer(1.0, setattr, (fault_proxy, "fault", None))
        healing.start()
        write(store, fault, fault)
        assert fault_proxy.hits[fault] > 0
        healing.join()
    assert store.list() == ["503", "reset", "stall"]
    fault_proxy.fault = "503"
    with pytest.raises(StoreError, match=r"not reachable at storage\.endpoint"):
        store.reach()


def test_google_s_buckets_need_an_extra():
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(StoreError, match=r"^gs://bucket/a: gs:// needs the package gcsfs: pip install 'aptp\[gcs\]'$"):
        Store.open("gs://bucket/a").reach()


def test_no_credentials_at_all(s3_server, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    unlike_others = StorageConfig(endpoint=s3_server.endpoint, region="eu-west-1")  # fsspec keeps clients
    with pytest.raises(StoreError, match=r"no credentials: set AWS_ACCESS_KEY_ID"):
        Store.open("s3://bucket", unlike_others).list()
    with pytest.raises(StoreError, match=r"storage\.profile: 'nobody'"):
        Store.open("s3://bucket", StorageConfig(profile="nobody")).list()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/a", "unknown scheme"),
        ("s3:///a", "names no bucket"),
        ("s3://key:s3cr3t@bucket/a", "keys in the environment"),
        ("s3://bucket/a?secret_key=s3cr3t", "keys in the environment"),
    ],
)
def test_uris_that_are_refused(uri, message):
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(uri)
    assert "s3cr3t" not in str(caught.value)
